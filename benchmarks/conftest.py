"""Options, fixtures and the report of the benchmarks: `pytest benchmarks --out=DIR`.

With a space instead, a folder that is there already passes for a second one with tests: pytest reads its paths before these options.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import pytest
import torch
from interleaved import Clock, Race, Result
from op_race import SMOKE, STAGES, race_op

import fastconv

ROOT = pathlib.Path(__file__).parent.parent
ROWS = pytest.StashKey[list]()
BASELINES = ("eager NCHW", "eager channels_last")
ENVIRONMENT = ("MALLOC_", "LD_PRELOAD", "OMP_", "KMP_", "FASTCONV_")  # what changes times and is not seen in the command
MODELS = ("timm:convnext_tiny", "timm:convnextv2_tiny")


def pytest_addoption(parser):
    group = parser.getgroup("fastconv benchmarks")
    group.addoption("--out", metavar="DIR", help="folder for benchmarks.json")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--seconds", type=float, default=4.0, help="budget of the timed rounds of an op at a shape; 30 times that of a model")
    group.addoption("--smoke", action="store_true", help="tiny shapes: does it run, not how fast")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--model", action="append", metavar="NAME", help=f"may be given again; default {' and '.join(MODELS)}")
    group.addoption("--batch-size", type=int, help="default 8 on a CPU, 128 on CUDA")
    group.addoption("--image-size", type=int, default=224)


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc):
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", metafunc.config.getoption("--model") or MODELS)
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SMOKE if metafunc.config.getoption("--smoke") else STAGES, ids=lambda s: f"{s[0]}x{s[0]}x{s[1]}")


@pytest.fixture(scope="session")
def clock(pytestconfig):
    return Clock(torch.device(pytestconfig.getoption("--device")))


@pytest.fixture(scope="session")
def bandwidth(clock):
    return clock.bandwidth()


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()
    torch.cuda.empty_cache()


@pytest.fixture
def race(pytestconfig, benchmark, clock):
    """race(case, entrants, seconds, floors, ...) times the entrants interleaved and files a row for each pass of each."""

    def run(case: str, entrants, seconds: float, floors: dict[str, float] | None = None, **facts) -> None:
        contest = Race(clock, entrants)
        # A round of all entrants is what pytest-benchmark repeats and times; the times of each are taken inside it.
        benchmark.pedantic(contest.round, rounds=contest.rounds_in(seconds), iterations=1)
        rows = _rows(case, contest.results(), floors or {}, facts)
        benchmark.extra_info["results"] = rows
        pytestconfig.stash[ROWS] += rows
        _save(pytestconfig)  # now, so that a run that is cut short keeps what it measured

    return run


@pytest.fixture
def bench_op(pytestconfig, race, clock, bandwidth):
    """bench_op(op, shape, **case): gate, then race, one op at one stage of ConvNeXt-T."""
    return lambda op, shape, **case: race_op(op, shape, pytestconfig.getoption, race, clock, bandwidth, **case)


def _rows(case: str, results: list[Result], floors: dict[str, float], facts: dict) -> list[dict]:
    rows = []
    for what in dict.fromkeys(r.what for r in results):
        times = {r.entrant: r for r in results if r.what == what}
        baseline = min(times[name].median_ms for name in BASELINES if name in times)
        for name, r in times.items():
            rows.append(
                {"case": case, **facts, "pass": what, "entrant": name, "median_ms": r.median_ms, "spread": r.spread}
                | {
                    "speedup": baseline / r.median_ms,
                    "floor_ms": floors.get(what),
                    "rounds": r.rounds,
                    "dropped": r.dropped,
                    "noisy": r.noisy,
                }
            )
    return rows


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _facts(config) -> dict:
    device = torch.device(config.getoption("--device"))
    cpu = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{_processor()}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (_git("rev-parse", "HEAD") or "unknown") + (" with changes" if _git("status", "--porcelain") else ""),
        "command": shlex.join(["pytest", *map(str, config.invocation_params.args)]),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ENVIRONMENT)},
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fastconv": fastconv.__version__,
    }


def _processor() -> str:
    if importlib.util.find_spec("fastconv._C") is None:
        return ""
    from fastconv import _C

    return f", {_C.cpu_vendor()} family {_C.cpu_family()}"


def _version(package: str) -> str | None:
    module = sys.modules.get(package)
    return module and module.__version__


def _save(config) -> None:
    out = config.getoption("--out")
    if out:
        path = config.invocation_params.dir / out
        path.mkdir(parents=True, exist_ok=True)
        (path / "benchmarks.json").write_text(json.dumps({**_facts(config), "rows": config.stash[ROWS]}, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    facts = _facts(config)
    terminalreporter.section(f"{facts['device']} · torch {facts['torch']}")
    terminalreporter.write_line("median ms (speed-up over the faster eager layout); ~ marks a noisy run")
    for part in ([r for r in rows if "op" in r], [r for r in rows if "op" not in r]):
        for line in table(part) if part else ():
            terminalreporter.write_line(line)


def table(rows: list[dict]) -> list[str]:
    """One line a case and pass, one column an entrant."""
    entrants = list(dict.fromkeys(r["entrant"] for r in rows))
    groups: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        groups.setdefault((r["case"], r["pass"]), {})[r["entrant"]] = r
    lines = [["case", "pass", *entrants, "floor ms"]]
    for (case, what), found in groups.items():
        cells = [f"{'~' * r['noisy']}{r['median_ms']:.3g} ({r['speedup']:.2f}x)" if (r := found.get(e)) else "" for e in entrants]
        floor = next(iter(found.values()))["floor_ms"]
        lines.append([case, what, *cells, f"{floor:.3g}" if floor else ""])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
