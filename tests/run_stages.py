"""Runs the suite in stages, prints the time of each, and fails a stage that overruns its share by half.

    python tests/run_stages.py [--full] [STAGE ...]

The budgets are minutes on two cores; tests/README.md keeps the ledger of what each stage took.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time
from fnmatch import fnmatch
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Stage(NamedTuple):
    name: str
    minutes: float
    patterns: tuple[str, ...] = ()  # test files, as globs in tests/


STAGES = (
    Stage("lint", 0.5),
    Stage("ops", 4),  # op contract, hubs, CPU kernels, and every file that no other stage names
    Stage("cuda", 6.5, ("test_cuda*.py", "test_simt*.py", "test_geometry.py")),
    Stage("triton", 3.5, ("test_triton*.py",)),
    Stage("patch", 5, ("test_patch*.py", "test_convergence*.py")),
    Stage("models", 4.5, ("test_models*.py", "test_zoo*.py", "test_cli*.py", "test_demo*.py")),
    Stage("build", 1.5, ("test_build.py",)),
    Stage("benchmarks", 1, ("test_benchmarks.py",)),
)
NAMES = tuple(stage.name for stage in STAGES)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--full", action="store_true", help="slow tests too, without time budgets")
    args = parser.parse_args(argv)
    unknown = set(args.stages) - set(NAMES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; use {', '.join(NAMES)}")
    # Nothing that a user may have exported changes which code the suite runs.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTCONV_")}
    budgets = {stage.name: stage.minutes for stage in STAGES}
    files = files_of()
    lines, failed = [], False
    for name in args.stages or NAMES:
        print(f"\n=== stage {name}", flush=True)
        start = time.monotonic()
        codes = [subprocess.run(command, cwd=ROOT, env=environment).returncode for command in commands(name, files[name], args.full)]
        took = (time.monotonic() - start) / 60
        outcome = "failed" if any(codes) else "passed" if codes else "no tests"
        if not args.full and took > 1.5 * budgets[name]:
            outcome += ", over its budget by more than half"
        failed |= outcome != "passed"
        lines.append(f"{name:12}{took:7.1f} of {budgets[name]:4.1f} min   {outcome}")
        print(f"=== {lines[-1]}", flush=True)
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
