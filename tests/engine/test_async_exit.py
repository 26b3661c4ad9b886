"""AsyncLLM in programs that end while it works, or that fork."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.engine.serving import FOLDER

# Each of these programs would run for two minutes if its requests went on to their ends.
PROLOGUE = """
assert threading.active_count() == 1, threading.enumerate()  # importing it starts nothing, nor does making one
llm = AsyncLLM(LLMEngine(sys.argv[1], dtype="float32"))
assert threading.active_count() == 1, threading.enumerate()
params = SamplingParams(max_tokens=110, ignore_eos=True)
step = llm.engine.step
llm.engine.step = lambda: time.sleep(1) or step()
async def one(): return [o async for o in llm.generate([5], params)]
async def first(): return await anext(llm.generate([5], params))
"""
ENDINGS = {
    "never used": "",
    "in no loop": "kept = [llm.generate([5], params) for _ in range(3)]",
    "a loop that ended": "async def main(): asyncio.create_task(one()); await asyncio.sleep(0.5)\nasyncio.run(main())",
    "a loop left open": "loop = asyncio.new_event_loop(); task = loop.create_task(one())\n"
    "loop.run_until_complete(asyncio.sleep(0.5)); task._log_destroy_pending = False\n"
    "import warnings; warnings.simplefilter('ignore')",  # it is not about those of an open loop
    "in a daemon": "threading.Thread(target=asyncio.run, args=(one(),), daemon=True).start(); time.sleep(0.5)",
    "in a thread that outlives the main one": "threading.Thread(target=lambda: asyncio.run(first())).start()",
    "in a fork": """
kept = llm.generate([5], params)
if os.fork() == 0:
    for use in (lambda: llm.generate([5]), lambda: asyncio.run(llm.close())):
        try:
            use()
        except RuntimeError as error:
            assert "is a fork of" in str(error), error
        else:
            os._exit(1)
    del kept
    os._exit(0)
assert os.wait()[1] == 0
""",
}
PROGRAM = f"""
import asyncio, os, sys, threading, time
from grok_engine import AsyncLLM, LLMEngine, SamplingParams
pids = {{}}
for name, ending in {ENDINGS!r}.items():
    pid = os.fork()
    if pid == 0:
        pids.clear()
        exec({PROLOGUE!r} + ending)
        break
    pids[pid] = name
began = time.monotonic()
while pids:  # in the first process alone: the others go through the interpreter's shutdown, which is the test
    pid, status = os.wait()
    print(f"{{pids.pop(pid)}}: status {{status}}, {{int((time.monotonic() - began) / 60)}} min")
"""


def test_programs_end_soon_and_in_silence() -> None:
    """Whatever still runs. Each is a fork of one that has imported everything, which takes the longest."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(FOLDER)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: status 0, 0 min" for name in ENDINGS)
