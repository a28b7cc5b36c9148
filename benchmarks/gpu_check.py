"""Everything worth doing when a GPU is at hand: `make gpu-check OUT=folder STAGE=probe,test,sanitize,graph,bench`.

Uses the Python that already holds torch (with setuptools, pybind11, ninja, pytest, pytest-benchmark, timm, typer, rich ...),
without network: installs the checkout there in editable form, which builds the compiled libraries, then runs the stages
asked for, each under nine minutes. A step is green, red, or "recorded" where it could not be tried, as its output says. A step
that fails or hangs does not stop the next. What the steps run is in tests/gpu and in this folder.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("probe", "test", "sanitize", "graph", "bench")
STAGE_S = 530  # of one stage; the build counts towards the first
RECORDED = 77  # exit status of a step that could not be tried
OUTCOMES = {0: "green", RECORDED: "recorded"}


class Step(NamedTuple):
    name: str
    seconds: int  # that it may take
    command: list


def build_steps() -> list[Step]:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ROOT]
    return [Step("build", 240, pip), Step("doctor", 40, [sys.executable, "-m", "fastconv.doctor"])]


def steps_of(stage: str, out: pathlib.Path, scratch: pathlib.Path) -> list[Step]:
    """The most telling first: what no time is left for is red. `scratch`: for results that go to `out` under the step's name."""

    def module(name: str, *args: str) -> list:
        return [sys.executable, "-m", f"gpu.{name}", *args]

    def pytest(*args) -> list:
        return [sys.executable, "-m", "pytest", *args]

    def bench(name: str, seconds: int, backend: str, *args: str) -> Step:
        command = pytest(ROOT / "benchmarks", "--device", "cuda", "--out", scratch / name, *args)
        return Step(name, seconds, ["env", f"FASTCONV_BACKEND={backend}", *command])

    if stage == "probe":
        return [Step("probes", 240, module("probes"))]
    if stage == "test":
        checks = {"contract": 200, "shapes": 120, "stream": 60, "huge": 90, "parity": 90, "second_gpu": 60}
        steps = [Step(name, seconds, module("checks", name)) for name, seconds in checks.items()]
        for backend in ("cuda", "triton"):
            settings = ["CUBLAS_WORKSPACE_CONFIG=:4096:8", "CONVERGENCE_DEVICE=cuda", f"CONVERGENCE_BACKEND={backend}"]
            steps.append(Step(f"convergence-{backend}", 90, ["env", *settings, *pytest("-q", ROOT / "tests" / "test_convergence.py")]))
        return [*steps, Step("repeat", 200, module("checks", "repeat"))]
    if stage == "sanitize":
        return [Step(tool, 240, module("sanitizer", tool)) for tool in ("memcheck", "racecheck", "initcheck")]
    if stage == "graph":
        return [Step("graph", 240, module("checks", "graph"))]
    demo = ["--device", "cuda", "--dtype", "bfloat16", "--batch-size", "128", "--steps", "32", "--output", out / "demo.png"]
    return [
        bench("bench_cuda", 200, "cuda", "--seconds", "0.7", "-k", "not model and not linear and not response"),
        bench("bench_triton", 120, "triton", "--seconds", "0.7", "-k", "not model and not linear", "--no-compile"),
        bench("bench_models", 180, "", "--seconds", "0.5", "-k", "test_model", "--model", "convnext_tiny"),
        Step("demo", 60, [sys.executable, "-m", "fastconv.cli", "demo", *demo]),
    ]


def environment() -> dict[str, str]:
    """Nothing that a user may have exported changes what is checked, except for PYTHONPATH, which may hold packages."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTCONV_")}
    kept |= {"FASTCONV_CPU": "1", "FASTCONV_CUDA": "1", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
    for name, folder in (("PYTHONPATH", ROOT / "tests"), ("PATH", pathlib.Path(sys.executable).parent)):  # there lies ninja
        kept[name] = os.pathsep.join([str(folder), *filter(None, [kept.get(name)])])
    return kept


def run_step(command: list, seconds: float, log) -> tuple[str, str]:
    """(outcome, last lines). Its processes end with it; one whose time is over is red."""
    log.write(f"\n$ {' '.join(map(str, command))}\n")
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        outcome = OUTCOMES.get(process.returncode, "red")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, outcome = process.communicate()[0] + f"\nstopped after {seconds:.0f} s", "red"
    log.write(output)
    log.flush()
    return outcome, "\n".join(collections.deque(output.strip().splitlines(), 25))


def together(outcomes: list[str]) -> str:
    return next((outcome for outcome in ("red", "recorded") if outcome in outcomes), "green")


def table(record: dict) -> str:
    lines = [f"{record['device']}, torch {record['torch']}, {record['date']}"]
    for stage in record["stages"]:
        lines.append(f"{stage['stage']:22}{stage['outcome']:9}{stage['seconds']:7.1f} s")
        lines += [f"  {step['step']:20}{step['outcome']:9}{step['seconds']:7.1f} s" for step in stage["steps"]]
    return "\n".join(lines) + "\n"


def run_stages(names: list[str], out: pathlib.Path, record: dict) -> None:
    """Fills record["stages"]; what is known so far is in `out` after every step."""
    with open(out / "gpu_check.log", "w") as log, tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        for name in names:
            stage = {"stage": name, "outcome": "green", "seconds": 0.0, "steps": []}
            record["stages"].append(stage)
            begin = time.monotonic()
            for step in [*(build_steps() if name == names[0] else ()), *steps_of(name, out, scratch)]:
                start = time.monotonic()
                left = min(step.seconds, begin + STAGE_S - start)
                outcome, message = run_step(step.command, left, log) if left >= 5 or left == step.seconds else ("red", "no time was left")
                seconds = round(time.monotonic() - start, 1)
                stage["steps"].append({"step": step.name, "outcome": outcome, "seconds": seconds, "message": message})
                stage["outcome"] = together([row["outcome"] for row in stage["steps"]])
                stage["seconds"] = round(time.monotonic() - begin, 1)
                for path in scratch.glob("*/benchmarks.json"):  # of a step that was stopped too
                    shutil.move(path, out / f"{path.parent.name}.json")
                print(f"--- {name}: {step.name}: {outcome}, {seconds} s\n{message}\n", flush=True)
                (out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
                (out / "gpu_check.txt").write_text(table(record))


def stage_names(text: str) -> list[str]:
    names = [name for name in text.replace(" ", "").split(",") if name]
    unknown = sorted(set(names) - set(STAGES))
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"unknown stage {', '.join(unknown) or repr(text)}; use {', '.join(STAGES)}")
    return [name for name in STAGES if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out")
    parser.add_argument("--stage", type=stage_names, default=list(STAGES), metavar="NAME,...", help=f"of {', '.join(STAGES)}; default all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"make gpu-check OUT={args.out} STAGE={','.join(args.stage)}",
        "stages": [],
    }
    run_stages(args.stage, out, record)
    print(table(record), end="")
    return int(together([stage["outcome"] for stage in record["stages"]]) == "red")


if __name__ == "__main__":
    sys.exit(main())
