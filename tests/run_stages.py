"""Runs the suite in stages, two at a time, prints the time of each, and fails a stage that overruns its share by half.

    python tests/run_stages.py [--full] [--jobs N] [STAGE ...]

The budgets are minutes beside another stage on two cores; tests/README.md keeps the ledger of what each stage took.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Stage(NamedTuple):
    name: str
    minutes: float
    patterns: tuple[str, ...] = ()  # test files, as globs in tests/


STAGES = (
    Stage("lint", 0.5),
    Stage("cuda", 14, ("test_cuda*.py", "test_simt*.py", "test_geometry.py")),  # the longest begins first
    Stage("ops", 7.5),  # op contract, hubs, CPU kernels, and every file that no other stage names
    Stage("triton", 7, ("test_triton*.py",)),
    Stage("patch", 8, ("test_patch*.py", "test_convergence*.py")),
    Stage("models", 6, ("test_models*.py", "test_cli*.py", "test_demo*.py", "test_distillation.py")),
    Stage("build", 4, ("test_build.py",)),
    Stage("benchmarks", 2, ("test_benchmarks.py",)),
)
NAMES = tuple(stage.name for stage in STAGES)
LARGEST = "ops"  # its slow tests take up to 16 GB of memory: none runs beside them


def files_of() -> dict[str, list[str]]:
    """Test files of each stage; every file is in at least one."""
    found = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    files = {stage.name: {name for name in found if any(fnmatch(name, p) for p in stage.patterns)} for stage in STAGES}
    files["ops"] = found.difference(*files.values())
    return {name: sorted(names) for name, names in files.items()}


def commands(stage: str, files: list[str], full: bool) -> list[list[str]]:
    if stage == "lint":
        return [[sys.executable, "-m", "ruff", "check", "."], [sys.executable, "-m", "ruff", "format", "--check", "."]]
    slow = ["--slow"] if full else []
    return [[sys.executable, "-m", "pytest", "-q", "--durations=5", *slow, *(f"tests/{name}" for name in files)]] if files else []


def run(stage: Stage, files: list[str], full: bool, environment: dict[str, str], output=None) -> str:
    """Runs a stage, its output into a file or onto the screen; the line of the summary."""
    start = time.monotonic()
    todo = commands(stage.name, files, full)
    codes = [subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode for command in todo]
    took = (time.monotonic() - start) / 60
    outcome = "failed" if any(codes) else "passed" if codes else "no tests"
    if not full and took > 1.5 * stage.minutes:
        outcome += ", over its budget by more than half"
    return f"{stage.name:12}{took:7.1f} of {stage.minutes:4.1f} min   {outcome}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--full", action="store_true", help="slow tests too, without time budgets")
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time; each prints when it ends (default %(default)s)")
    args = parser.parse_args(argv)
    unknown = set(args.stages) - set(NAMES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    # Nothing that a user may have exported changes which code the suite runs.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTCONV_")}
    if args.jobs > 1:
        environment["OMP_WAIT_POLICY"] = "passive"  # a thread that spins at a barrier takes the other stage's core
    files = files_of()
    printing = threading.Lock()

    def run_and_show(stage: Stage) -> str:
        print(f"\n=== stage {stage.name}", flush=True)
        if args.jobs == 1:
            line = run(stage, files[stage.name], args.full, environment)
        else:
            with tempfile.TemporaryFile("w+", errors="replace") as output:
                line = run(stage, files[stage.name], args.full, environment, output)
                output.seek(0)
                with printing:
                    print(f"\n=== output of stage {stage.name}\n{output.read()}", flush=True)
        print(f"=== {line}", flush=True)
        return line

    chosen = [stage for stage in STAGES if stage.name in (args.stages or NAMES)]
    alone = [stage for stage in chosen if args.full and stage.name == LARGEST]
    lines = [run_and_show(stage) for stage in alone]
    with ThreadPoolExecutor(args.jobs) as pool:
        lines += pool.map(run_and_show, [stage for stage in chosen if stage not in alone])
    print("\n" + "\n".join(lines))
    return int(not all(line.endswith("passed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
