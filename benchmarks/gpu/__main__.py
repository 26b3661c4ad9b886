"""python3 -m benchmarks.gpu PART [--only STAGE ...] [--bundle FOLDER] [--out FOLDER]: all that needs a GPU, in minutes.

`first` (4 minutes at most) says whether the kernels load and are right, and how fast they are; `second` (7 at most)
proves them at full size, tunes, measures and profiles. Both write one archive, after every stage and every ten seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from . import ROOT, bundle
from .run import archive, run_part, summary
from .stages import PARTS, Run


def main() -> int:
    doc = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=doc[1])
    parser.add_argument("part", choices=PARTS, help="what to run")
    here = Path.cwd().joinpath  # the stages run in ROOT
    parser.add_argument("--out", type=here, default=ROOT / "build/bench-gpu", help="where the archive goes")
    parser.add_argument("--bundle", type=here, help="modules and kernels built before (benchmarks.gpu.bundle)")
    parser.add_argument("--only", action="append", metavar="STAGE", help="run this stage; may be given more than once")
    parser.add_argument("--list", action="store_true", help="print the part's stages and their limits")
    parser.add_argument("--rehearse", action="store_true", help="run every command on a CPU, and measure nothing")
    a = parser.parse_args()
    began = time.monotonic()
    if a.bundle and not (a.bundle / bundle.ABOUT).is_file():
        parser.error(f"--bundle {a.bundle} has no {bundle.ABOUT}")
    part, chip = PARTS[a.part], "rehearsal" if a.rehearse else _chip()
    if not a.list and not chip:
        print("bench-gpu: there is no GPU", file=sys.stderr)
        return 2
    name = f"{re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-')}-{date.today().isoformat()}-{a.part}"
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(Path(temporary, name), a.bundle, a.rehearse)
        stages = part.stages(run)
        if a.list:
            print(f"{a.part}: at most {part.limit:g} s in all")
            for stage in stages:
                print(f"{stage.name:26} at most {stage.limit:3g} s{', must pass' if stage.gate == 'all' else ''}")
            return 0
        unknown = [only for only in a.only or () if only not in [stage.name for stage in stages]]
        if unknown:
            parser.error(f"no stage {unknown[0]!r}: expected one of {', '.join(stage.name for stage in stages)}")
        os.chdir(ROOT)
        run.folder.mkdir()
        a.out.mkdir(parents=True, exist_ok=True)
        file = a.out / f"{name}{'-only' if a.only else ''}.tar.gz"  # the whole part's is kept
        os.environ.update(_environment(a.bundle, Path(temporary, "triton")))
        chosen = [stage for stage in stages if not a.only or stage.name in a.only or stage.needed]
        said = list[str]()

        def say(line: str) -> None:
            print(line, flush=True)
            said.append(line)

        def keep() -> None:
            (run.folder / "summary.txt").write_text("\n".join(said) + "\n")
            archive(run.folder, file, sorted((ROOT / "kernels/grok_kernels/tuned").glob("*.json")))

        # a signal ends the processes, too; a shell's background would ignore SIGINT
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            outcomes = run_part(chosen, run.folder, part.limit - (time.monotonic() - began), keep, say)
        except KeyboardInterrupt:
            say("   INTERRUPTED: what is not named above did not run, or not to its end")
            keep()
            return 130
        for line in summary(outcomes):
            say(line)
        say(f"   {time.monotonic() - began:.0f} s in all; results and logs in {file}")
        keep()
    return 1 if any(o.bad for o in outcomes) else 0


def _chip() -> str:
    """The GPU's name from the driver; empty without one. Neither starts CUDA nor imports torch."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:  # a driver that hangs
        return ""
    return (found.stdout.splitlines() or [""])[0]


def _environment(folder: Path | None, cache: Path) -> dict[str, str]:
    """For the processes of all stages: one cache of compiled kernels, and the commit of the sources.

    The bundle knows the commit; where it is unpacked there may be no repository.
    """
    own = bundle.read(folder)["commit"] if folder else bundle.commit() if (ROOT / ".git").exists() else None
    commit = os.environ.get("GROK_BENCH_COMMIT") or own
    cache.mkdir()
    return {"TRITON_CACHE_DIR": str(cache), **({"GROK_BENCH_COMMIT": commit} if commit else {})}


if __name__ == "__main__":
    sys.exit(main())
