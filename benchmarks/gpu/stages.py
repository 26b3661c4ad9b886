"""The two parts. `first` says within 4 minutes whether anything is wrong, and how fast the most important kernels are;
`second` proves all at full size, tunes, measures again and profiles.

The most important comes first, since a part may be cut short anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import PATHS
from .run import WRONG, Command, Outcome, Stage

PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", "--durations=10")
LATENCY = (
    "latency", "--model", "grok-1", "--set", "num_layers=2", "--dummy", "--weights", "fp8",
    "--batch-size", "8", "--input-len", "256", "--output-len", "64", "--num-iters", "3", "--num-iters-warmup", "1",
    "--max-num-seqs", "8", "--max-model-len", "2048",
)  # fmt: skip
CONTESTANTS = ("grok_kernels cuda*", "grok_kernels triton*", "torch _scaled_grouped_mm*", "torch _grouped_mm*",
               "torch eager", "torch sdpa*")  # fmt: skip
COMPILING = ("grok_kernels cuda*", "grok_kernels triton*", "DeepGEMM*", "torch FlexAttention*")
TRITON_PARTS, SHARDS, ENGINES = 5, 3, 6  # processes side by side
SANITIZER = "compute-sanitizer"
ENGINE_TESTS, MEMORY = "tests/gpu/test_gpu_engine.py", "pages_are_what_is_left"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")


@dataclass(frozen=True)
class Part:
    limit: float  # seconds in all, whatever the stages take
    stages: Callable[[Run], list[Stage]]


@dataclass(frozen=True)
class Run:
    """What the commands of a run share. In a rehearsal they run on this machine's CPU, at tiny sizes."""

    folder: Path  # of results and logs
    bundle: Path | None = None
    rehearse: bool = False

    @property
    def env(self) -> dict[str, str]:
        paths = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}

    def python(self, name: str, module: str, *args: str, under: Sequence[str] = (), **env: str) -> Command:
        return Command(name, (*under, PYTHON, "-m", module, *args), {**self.env, **env})

    def bench(self, name: str, *args: str, **env: str) -> Command:
        """A benchmark with results in NAME.json."""
        file = str(self.folder / f"{name}.json")
        device = "cpu" if self.rehearse else "cuda"
        return self.python(name, "grok_engine.cli", "bench", *args, "--device", device, "--json", file, **env)

    def tests(self, name: str, *args: str, **env: str) -> Command:
        device = {"GROK_TEST_DEVICE": "cpu:0" if self.rehearse else "cuda", "OMP_NUM_THREADS": "2"}
        return Command(name, (*PYTEST, *args), {**self.env, **device, **env})


def first(run: Run) -> list[Stage]:
    return [
        _load(run),
        Stage("small", lambda _: _small(run), 45, "all", at_once=True),
        _tiles(run),
        Stage("figures", lambda o: _figures(run, "@cuda-first", o), 100),
        Stage("decode with graphs", lambda o: [_decode(run, "decode-graphs", o)], 35),
        Stage("decode without", lambda o: [_decode(run, "decode-eager", o, "--enforce-eager")], 30),
    ]


def second(run: Run) -> list[Stage]:
    return [
        _load(run),
        _tiles(run),
        Stage("full size", lambda _: _full_size(run), 130, "all", at_once=True),
        Stage("engine", lambda _: _engine(run), 80, "all", at_once=True),
        # alone: it takes what memory is left
        Stage("memory", lambda _: [run.tests("memory", ENGINE_TESTS, "-k", MEMORY)], 30, "all"),
        Stage("figures", lambda _: _figures(run, "@cuda", ()), 80),
        Stage("figures beside what compiles", lambda _: _compiling(run), 90),
        Stage("tuning", lambda _: [_tune(run, "tune", "--model", "grok-1", "--format", "fp8")], 60, "none"),
        Stage("profiles", lambda _: [_profile(run, *which) for which in _slowest(run)], 40, "none"),
        Stage("sanitizers", lambda _: _sanitizers(run), 40, "none", at_once=True),
    ]


PARTS = {"first": Part(240, first), "second": Part(420, second)}


def _load(run: Run) -> Stage:
    args = [*(("--bundle", str(run.bundle)) if run.bundle else ()), *(("--rehearse",) if run.rehearse else ())]
    return Stage("load", lambda _: [run.python("load", "benchmarks.gpu.load", *args)], 80, "all", needed=True)


def _tiles(run: Run) -> Stage:
    """Whether the CUDA kernels for few rows give the bits of those for many: only then may they serve decoding."""
    return Stage("tiles with the same bits", lambda _: [_tune(run, "tune-swapped", "--swapped")], 25, "none")


def _small(run: Run) -> list[Command]:
    """The CUDA kernels at tiny and medium sizes, and Triton's, compiled in several processes; each may hang alone."""
    tiny, middling = {"GROK_TEST_DEVICE": "cpu:0"}, {"GROK_TEST_DEVICE": "cuda", "GROK_TEST_SHRINK": "8"}
    small = "benchmarks.gpu.small"
    if run.rehearse:  # the CPU's kernels in place of CUDA's; Triton's are interpreted
        args, env = ("--on", "cpu", "--few", "--call", "*norm*"), {**tiny, "TRITON_INTERPRET": "1"}
        return [run.python(f"small-{n}", small, b, *args, **env) for n, b in (("cuda", "cpu"), ("triton", "triton"))]
    found = [run.python("small-cuda", small, "cuda", **tiny), run.python("middling-cuda", small, "cuda", **middling)]
    for i in range(TRITON_PARTS):
        part = ("--few", "--part", f"{i}/{TRITON_PARTS}")
        found.append(run.python(f"middling-triton-{i}", small, "triton", *part, **middling))
    return found


def _by_hand_lost(outcomes: Sequence[Outcome]) -> bool:
    """Whether the CUDA kernels hang or fault, which ends their process; wrong numbers the harness names."""
    ours = [o for o in outcomes if o.command in ("small-cuda", "middling-cuda")]
    return any(o.status != "passed" and o.code != WRONG for o in ours)


def _figures(run: Run, problems: str, outcomes: Sequence[Outcome]) -> list[Command]:
    who = [c for c in CONTESTANTS if not (_by_hand_lost(outcomes) and c.startswith("grok_kernels cuda"))]
    if run.rehearse:
        return [run.bench("kernels", "kernels", "@quick", "--smoke", "--no-compile")]
    return [_race(run, "kernels", problems, who, "--no-compile")]


def _race(run: Run, name: str, problems: str, who: Sequence[str], *more: str) -> Command:
    args = ("--seconds", "0.4", "--limit", "30", *more, *(part for c in who for part in ("--contestant", c)))
    return run.bench(name, "kernels", problems, *args)


def _compiling(run: Run) -> list[Command]:
    """Few problems, since these peers compile for ten seconds and more each.

    Each has a process of its own: one of them once ended the process of all.
    """
    if run.rehearse:
        return [run.bench("kernels-compiling", "kernels", "group_tokens/grok-1/decode/zipf-t64", "--smoke")]
    return [_race(run, "kernels-compiling", "@cuda-compiling", COMPILING, "--subprocess")]


def _decode(run: Run, name: str, outcomes: Sequence[Outcome], *more: str) -> Command:
    forced = {"GROK_KERNELS_BACKEND": "triton"} if _by_hand_lost(outcomes) and not run.rehearse else {}
    if run.rehearse:
        sizes = ("--batch-size", "1", "--num-iters", "1", "--input-len", "4", "--output-len", "4")
        return run.bench(name, "latency", "--model", "tiny", *sizes, "--num-iters-warmup", "0", *more)
    return run.bench(name, *LATENCY, *more, **forced)


def _tune(run: Run, name: str, *args: str) -> Command:
    """Tune into the package, where later stages read it; the archive has a copy."""
    return run.python(name, "grok_kernels.autotune", *(["--list"] if run.rehearse else args))


def _full_size(run: Run) -> list[Command]:
    """Each process needs up to 19 GB: more of them would not fit into memory."""
    chosen = ("-k", "as_the_reference and norm and selected") if run.rehearse else ()
    args = ("tests/gpu", f"--ignore={ENGINE_TESTS}", *chosen)
    return [run.tests(f"full-size-{i}", *args, GROK_TEST_SHARD=f"{i}/{SHARDS}") for i in range(SHARDS)]


def _engine(run: Run) -> list[Command]:
    """The engine on tiny models; most of the time goes into compiling."""
    if run.rehearse:
        return [run.tests("engine-0", ENGINE_TESTS, "-k", "folder")]
    named = "test_gpu_engine or fp32 or bf16 or quality or any_batch or goldens_in_one"
    chosen = f"{named} or (any_number_format and not reference)"
    files = ("tests/e2e/test_goldens.py", "tests/engine/test_activations.py", "tests/engine/test_invariance.py")
    args = (ENGINE_TESTS, *files, "-k", f"({chosen}) and not {MEMORY}")
    return [run.tests(f"engine-{i}", *args, GROK_TEST_SHARD=f"{i}/{ENGINES}") for i in range(ENGINES)]


def _sanitizers(run: Run) -> list[Command]:
    """compute-sanitizer over the CUDA kernels. It may not follow TMA's barriers: its findings only inform."""
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GROK_TEST_DEVICE": "cpu:0"}
    args = ("cpu", "--on", "cpu", "--call", "*norm*") if run.rehearse else ("cuda",)
    found = []
    for tool in ("memcheck", "racecheck"):
        under = (SANITIZER, "--tool", tool, "--error-exitcode", "9")
        found.append(run.python(tool, "benchmarks.gpu.small", *args, "--few", under=under, **env))
    return found


def _slowest(run: Run) -> list[tuple[str, str]]:
    if run.rehearse:
        return [("rms_norm/grok-1/decode/t64", "torch eager")]
    from .profile import slowest  # imports torch, which the driver of the stages does without

    return slowest(run.folder / "kernels.json")


def _profile(run: Run, problem: str, contestant: str) -> Command:
    """ncu without locked clocks: locking needs rights, and takes long to fail without them."""
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        ncu += ["--section", section]
    device = ("--device", "cpu") if run.rehearse else ()
    name = f"ncu-{problem.replace('/', '-')}"
    return run.python(name, "benchmarks.gpu.profile", problem, contestant, *device, under=ncu)
