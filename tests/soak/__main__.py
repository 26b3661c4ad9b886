"""Random traffic of everything at once, compared bit for bit with each request alone.

    python -m tests.soak --minutes 3 [--seed N]
    python -m tests.soak --seed N --repeat 20       # one round, again and again: threads meet differently each time

A round has a seed, a small model, one engine, and its three faces in turn under chaos. The exit status is 1 if anything
differs, is left behind or grows; the last lines name the round's seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path

import torch

from grok_engine import LLM, EngineAsleepError, SamplingParams

from .chaos import fork, is_injected, refused
from .faces import event_loops, llm_threads, step_loop
from .oracle import Oracle
from .report import LIMITS, Tally, growth, one_arena, resident
from .round import Round, settle
from .traffic import draw_jobs
from .world import draw_model, draw_options, write_model

JOBS, RUNS = 24, 14
FAILURES = [0.0, 0.0, 0.001, 0.005]  # share of the calls in a step that raise
CTRL_C = [0.0, 0.0, 0.05, 0.5]  # seconds between two; 0: none
HANGS = 180.0  # seconds: no round takes half of that


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next has the next")
    parser.add_argument("--repeat", type=int, help="run the round of --seed so many times, however long it takes")
    parser.add_argument("--runs", type=int, default=RUNS, help="requests of each client")
    options = parser.parse_args(arguments)
    seeds = [options.seed] * options.repeat if options.repeat else range(options.seed, options.seed + 10**6)
    end = time.monotonic() + (float("inf") if options.repeat else options.minutes * 60)
    tally = Tally()
    one_arena()
    memory: list[dict[str, float]] = []
    wrong: list[str] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda hint: None if is_injected(hint.exc_value) else wrong.append(f"unraisable: {hint}")
    try:
        for seed in seeds:
            began = time.monotonic()
            if began >= end or wrong:
                break
            faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)
            try:
                found, what = play(seed, options.runs, tally)
            except Exception:
                found, what = [traceback.format_exc()], "the round itself failed"
            wrong += [f"{problem}\n  {what}\n  python -m tests.soak --seed {seed} --repeat 10" for problem in found]
            memory.append(resident())
            print(f"seed {seed}: {time.monotonic() - began:4.1f} s, {memory[-1]['MiB']:.1f} MiB, {what}", flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.unraisablehook = hook
    rises = growth(memory)
    for name, rise in rises.items():
        if rise > LIMITS[name]:
            wrong.append(f"{rise:.1f} {name} more after the warm-up, expected at most {LIMITS[name]}")
    print(f"\n{tally.table()}\n\nafter the warm-up: " + ", ".join(f"{r:+.1f} {name}" for name, r in rises.items()))
    for problem in wrong[:20]:
        print(f"\nWRONG: {problem}")
    print(f"\n{len(wrong)} differences")
    return 1 if wrong else 0


def play(seed: int, runs_each: int, tally: Tally) -> tuple[list[str], str]:
    """One round: what went wrong, and what it was about."""
    rng = random.Random(seed)
    threads = set(threading.enumerate())
    with tempfile.TemporaryDirectory() as folder:
        packed = rng.random() < 0.75
        options = draw_options(rng, packed)
        model = write_model(draw_model(rng), Path(folder), rng, options["dtype"]) if packed else "tiny"
        what = f"{'random' if packed else model}, " + ", ".join(f"{name}={value}" for name, value in options.items())
        print(f"seed {seed} begins", file=sys.stderr, flush=True)
        r = Round(rng, LLM(model, **options), draw_jobs(rng, JOBS), runs_each, tally)
        left = weakref.ref(r.engine.model)
        try:
            _faces(r)
            oracle = Oracle(model, options)
            _judge(r, oracle)
            oracle.close()
        finally:
            r.llm.close()
        wrong = list(dict.fromkeys(r.wrong))
    del r, oracle
    resident()
    if left() is not None:
        wrong.append("the model is not collected")
    end = time.monotonic() + 5
    while (more := set(threading.enumerate()) - threads) and time.monotonic() < end:
        time.sleep(0.01)
    return wrong + [f"thread {thread.name} is left" for thread in more], what


def _faces(r: Round) -> None:
    """The engine's faces in turn; the last one takes the engine with it."""
    rng, engine = r.rng, r.engine
    for face in rng.sample([step_loop, llm_threads], 2):
        face(r, rng.choice(FAILURES), rng.choice(CTRL_C))
        r.wrong += [f"{problem} after {face.__name__}" for problem in settle(engine)]
        if what := fork(engine, r.tally.events):
            r.wrong.append(what)
        if rng.random() < 0.5:
            _sleep(r)
        if engine.closed:
            r.wrong.append(f"{face.__name__} closed the engine")
            return
    event_loops(r, rng.choice(FAILURES), 0.0)


def _sleep(r: Round) -> None:
    """Free the weights and load them again."""
    engine = r.engine
    engine.sleep()
    r.tally.events["sleeps"] += 1
    for call in (engine.step, lambda: engine.add_request("x", [5], SamplingParams())):
        r.tally.events["refused: asleep"] += 1
        if what := refused(call, EngineAsleepError):
            r.wrong.append(f"asleep, {what}")
    engine.wake_up()


def _judge(r: Round, oracle: Oracle) -> None:
    """Compare every run with its job alone, and count how it ended."""
    for job, logits_TV in r.logits:
        r.tally.events["logits compared"] += 1
        if not torch.equal(logits_TV, oracle.logits(job)):
            r.wrong.append(f"logits of {job} differ")
    for run in r.runs.values():
        compared, wrong = oracle.judge(run)
        if run.ended == "abort" and run.fate == "finish":
            wrong.append("aborted, and nobody did")
        if run.ended == "unanswered":
            if run.fate == "discard":
                run.ended = "discarded"
            elif r.lost > 0:
                r.lost, run.ended = r.lost - 1, "lost to Ctrl-C"
            else:
                wrong.append("no last output")
        if wrong:
            r.wrong.append("\n    ".join([f"{run.request_id} ({run.kind.name}, {run.ended}), {run.job}", *wrong]))
        r.tally.events["tokens compared"] += compared
        for row in (run.face, *run.job.kinds):
            r.tally.ended[row, run.ended] += 1


if __name__ == "__main__":
    sys.exit(main())
