"""Everything worth doing when a GPU is at hand: `make gpu-check OUT=folder`, under nine minutes, without network.

Uses the Python that already holds torch (with setuptools, pybind11, pytest, pytest-benchmark, timm, typer, rich ...) and
installs the checkout there in editable form. One stage that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOTAL_S = 530


def stages(out: pathlib.Path) -> dict[str, tuple[int, list]]:
    """Stage -> (seconds that it may take, command), the most telling first."""
    this = [sys.executable, __file__, "--stage"]
    bench = [sys.executable, "-m", "pytest", ROOT / "benchmarks", "--device", "cuda", "-k"]
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ROOT]
    demo = ["demo", "--device", "cuda", "--dtype", "bfloat16", "--batch-size", "128", "--steps", "32", "--output", out / "demo.png"]
    return {
        "build": (120, pip),
        "doctor": (30, [sys.executable, "-m", "fastconv.doctor"]),
        "contract": (180, [*this, "contract"]),
        "repeat": (60, [*this, "repeat"]),
        "stream": (60, [*this, "stream"]),
        "graph": (60, [*this, "graph"]),
        "demo": (90, [sys.executable, "-m", "fastconv.cli", *demo]),
        "bench-norm": (120, [*bench, "test_depthwise_conv_norm", "--seconds", "1", "--out", out / "bench_norm"]),
        "bench-models": (180, [*bench, "test_model", "--seconds", "0.5", "--out", out / "bench_models"]),
        "bench-others": (60, [*bench, "not norm and not model", "--seconds", "1", "--no-compile", "--out", out / "bench_others"]),
    }


def check(case, dtype: torch.dtype) -> str:
    from fastconv.testing import check_op

    try:
        check_op(case, dtype, "triton", device="cuda")
    except Exception as error:  # a wrong result, a failed compilation or a launch error: each is one red line, and the rest goes on
        return f"{case.op} {case} {dtype}: {type(error).__name__}: {error}"
    return ""


def contract() -> int:
    """Every case and dtype of every op against float64, in several processes because the kernels take long to compile."""
    from fastconv.testing import CASES

    calls = [(c, d) for cases in CASES.values() for c in cases for d in c.dtypes if d != torch.float64]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        errors = [error for error in pool.map(check, *zip(*calls)) if error]
    print(*errors, sep="\n")
    print(f"{len(calls) - len(errors)} of {len(calls)} calls right")
    return int(bool(errors))


def real_calls():
    """One call of each op at the first stage of ConvNeXt-T, 16 images in bfloat16: (op, inputs, run)."""
    from fastconv import ops, testing

    for op in testing.CASES:
        inputs = testing.make_inputs(testing.Case(op, (16, 56, 56, 96)), torch.bfloat16, "cuda")
        function = getattr(ops, op)
        yield op, inputs, lambda inputs=inputs, function=function: testing.run(function, inputs)


def same(op: str, a: dict, b: dict) -> bool:
    wrong = [name for name in a if not torch.equal(a[name], b[name])]
    print(f"{op}: {'differs in ' + ', '.join(wrong) if wrong else 'equal bits'}")
    return not wrong


def repeat() -> int:
    """Equal inputs give equal bits, twenty times."""
    ok = True
    for op, _, run in real_calls():
        first = run()
        ok &= all(same(op, first, run()) for _ in range(20))
    return int(not ok)


def stream() -> int:
    """On a side stream whose input is still being written: a kernel on another stream would read what was there before."""
    ok = []
    for op, inputs, run in real_calls():
        expected = run()
        first = next(iter(inputs.tensors.values()))
        source = first.clone()
        side, busy = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda")
        first.fill_(7)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
                busy @ busy
            first.copy_(source)
            actual = run()
        side.synchronize()
        ok.append(same(op, expected, actual))
    return int(not all(ok))


def graph() -> int:
    """A forward captured into a CUDA graph, replayed on new numbers."""
    from fastconv import ops

    ok = []
    for op, inputs, _ in real_calls():
        with torch.no_grad():
            call = functools.partial(getattr(ops, op), **inputs.tensors, **inputs.options)
            call()  # compiles
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                result = call()
            next(iter(inputs.tensors.values())).mul_(-0.5)
            captured.replay()
            ok.append(same(op, {"out": call()}, {"out": result}))
    return int(not all(ok))


def run_stage(command: list, seconds: float, log) -> tuple[str, str]:
    """(outcome, last lines): "green" for exit code 0, "red" otherwise, also when the time is over."""
    log.write(f"\n$ {' '.join(map(str, command))}\n")
    environment = {**os.environ, "FASTCONV_CPU": "1", "PYTHONUNBUFFERED": "1", "PIP_NO_INDEX": "1"}
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        outcome = "green" if process.returncode == 0 else "red"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, outcome = process.communicate()[0] + f"\nstopped after {seconds:.0f} s", "red"
    log.write(output)
    return outcome, "\n".join(collections.deque(output.strip().splitlines(), 25))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out")
    parser.add_argument("--stage", choices=("contract", "repeat", "stream", "graph"), help="run this one here, without a record")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    if args.stage:
        return {"contract": contract, "repeat": repeat, "stream": stream, "graph": graph}[args.stage]()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": f"make gpu-check OUT={args.out}",
        "stages": [],
    }
    end = time.monotonic() + TOTAL_S
    with open(out / "gpu_check.log", "w") as log:
        for name, (limit, command) in stages(out).items():
            start = time.monotonic()
            left = min(limit, end - start)
            outcome, tail = run_stage(command, left, log) if left >= min(limit, 5) else ("not run", "no time was left")
            seconds = round(time.monotonic() - start, 1)
            record["stages"].append({"stage": name, "outcome": outcome, "seconds": seconds, "message": tail})
            print(f"--- {name}: {outcome}, {seconds} s\n{tail}\n", flush=True)
            (out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in record["stages"]:
        print(f"{row['stage']:14}{row['outcome']:9}{row['seconds']:7.1f} s")
    return int(any(row["outcome"] != "green" for row in record["stages"]))


if __name__ == "__main__":
    sys.exit(main())
