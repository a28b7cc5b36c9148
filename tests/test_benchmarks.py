"""The benchmarks run, say what they measured, and measure nothing that is wrong."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import interleaved  # noqa: E402

CPU = torch.device("cpu")


def bench(tmp_path, *args, **environment):
    """`pytest benchmarks --smoke ...` in a process of its own, and the rows that it filed."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--smoke", "--device=cpu", "--seconds=0.05", f"--out={tmp_path}", *args]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=300
    )
    path = tmp_path / "benchmarks.json"
    return result, json.loads(path.read_text()) if path.exists() else None


def test_ops_end_to_end(tmp_path):
    result, record = bench(tmp_path, "--no-compile", "-k", "depthwise_conv_norm or residual_scale")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    assert record["torch"] == torch.__version__ and "--smoke" in record["command"] and record["date"] and record["commit"]
    rows = {(r["op"], r["pass"], r["entrant"]): r for r in record["rows"]}
    expected = {
        (op, what, entrant)
        for op in ("depthwise_conv_norm", "residual_scale")
        for what in ("inference", "forward", "backward")
        for entrant in ("eager NCHW", "eager channels_last", "ours")
    }
    assert rows.keys() == expected
    for (op, what, _), r in rows.items():
        assert r["median_ms"] > 0 and r["rounds"] >= interleaved.FEWEST and r["floor_ms"] > 0
        baseline = min(rows[op, what, name]["median_ms"] for name in ("eager NCHW", "eager channels_last"))
        assert r["speedup"] == pytest.approx(baseline / r["median_ms"])
        assert f"({r['speedup']:.2f}x)" in result.stdout
    assert rows["depthwise_conv_norm", "forward", "ours"]["backend"] == "cpu"


WRONG = """
import torch
from fastconv import ops
right = ops.depthwise_conv_norm
def wrong(x, weight, *args, **kwargs):
    return right(x, weight.flip({dims}), *args, **kwargs)
ops.depthwise_conv_norm = wrong
"""


@pytest.mark.parametrize("dims, exit_code", (("()", 0), ("(3,)", 1)))
def test_a_wrong_kernel_is_not_timed(tmp_path, dims, exit_code):
    (tmp_path / "replaced_op.py").write_text(WRONG.format(dims=dims))
    args = ("--no-compile", "-k", "depthwise_conv_norm", "-p", "replaced_op")
    result, record = bench(tmp_path / "out", *args, PYTHONPATH=str(tmp_path))
    assert result.returncode == exit_code, result.stdout + result.stderr
    assert (record is None) == bool(exit_code)
    if exit_code:
        assert "error" in result.stdout and "exceeds" in result.stdout


def test_models_end_to_end(tmp_path):
    result, record = bench(tmp_path, "--no-compile", "-k", "test_model", "--model", "timm:convnext_atto")
    assert result.returncode == 0, result.stdout + result.stderr
    modes = {(r["case"].split()[-1], r["entrant"]) for r in record["rows"]}
    layouts = ("NCHW", "channels_last")
    assert modes == {(mode, f"{who} {layout}") for mode in ("training", "inference") for who in ("eager", "ours") for layout in layouts}


@pytest.mark.slow
def test_with_compile(tmp_path):
    result, record = bench(tmp_path, "--model", "timm:convnext_atto")
    assert result.returncode == 0, result.stdout + result.stderr
    for case in {r["case"] for r in record["rows"]}:
        assert {"compile", "ours + compile"} <= {r["entrant"] for r in record["rows"] if r["case"] == case}


class FakeClock(interleaved.Clock):
    """Every calibration takes as long as it is told to."""

    def __init__(self, calibrations):
        super().__init__(CPU)
        self.calibrations = iter(calibrations)

    def calibration(self):
        return next(self.calibrations)


def test_rounds_interleave_and_noisy_ones_are_dropped():
    order = []

    def entrant(name, values):
        values = iter(values)
        return (lambda clock: order.append(name) or {"step": next(values)},)

    noise = [1.0] * 5 + [1.0, 1.1, 1.5, 1.0, 0.9, 1.0, 0.7]  # five alone, then one a round: the third and the last stray
    race = interleaved.Race(
        FakeClock(noise), {"a": entrant("a", [0, 0, 1, 2, 99, 4, 5, 3, 99]), "b": entrant("b", [0, 0, 10, 10, 99, 10, 10, 10, 99])}
    )
    for _ in range(7):
        race.round()
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 2 + 7 and set(rounds) == {"ab", "ba"}
    a, b = race.results()
    assert (a.entrant, a.what, a.median_ms, a.rounds, a.dropped, a.noisy) == ("a", "step", 3, 5, 2, False)
    assert (b.median_ms, b.spread) == (10, 0)


def test_training_and_inference_are_apart():
    """Nobody's inference may warm its own training step: all run their first lap, then all their second."""
    order = []
    laps = {name: tuple(lambda clock, lap=f"{name}{i}": order.append(lap) or {lap[1]: 1.0} for i in range(2)) for name in "ab"}
    race = interleaved.Race(FakeClock([1.0] * 9), laps)
    for _ in range(4):
        race.round()
    assert [sorted(order[i : i + 4]) for i in range(0, len(order), 4)] == [["a0", "a1", "b0", "b1"]] * 6
    assert all({lap[1] for lap in order[i : i + 2]} == {str(i // 2 % 2)} for i in range(0, len(order), 2))
    assert [(r.entrant, r.what) for r in race.results()] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]


def test_a_run_with_too_few_quiet_rounds_says_so():
    race = interleaved.Race(FakeClock([1.0] * 5 + [2.0] * 4 + [1.0]), {"a": (lambda clock: {"step": 1.0},)})
    for _ in range(5):
        race.round()
    (result,) = race.results()
    assert result.noisy and result.rounds == 5 and result.dropped == 4


def test_the_clock_measures():
    _, ms = interleaved.Clock(CPU)(lambda: time.sleep(0.03))
    assert 29 < ms < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="what gpu-check says where there is no GPU")
def test_gpu_check_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    result = subprocess.run(
        ["make", "gpu-check", f"PYTHON={sys.executable}", f"OUT={out}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "sees no CUDA device: nothing was checked" in result.stderr
    assert not out.exists()


def test_gpu_check_records_each_stage(tmp_path, monkeypatch, capsys):
    """One stage that fails or hangs is recorded and does not stop the next; the whole is red."""

    def python(code):
        return [sys.executable, "-c", code]

    stages = {
        "good": (30, python("print('fine')")),
        "bad": (30, python("import sys; sys.exit('broken kernel')")),
        "hangs": (1, python("import time; print('began', flush=True); time.sleep(60)")),
        "last": (30, python("print('still run')")),
    }
    monkeypatch.setattr(gpu_check, "stages", lambda out: stages)
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    start = time.monotonic()
    assert gpu_check.main() == 1
    assert time.monotonic() - start < 20
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["outcome"] for row in record["stages"]] == ["green", "red", "red", "green"]
    assert "broken kernel" in record["stages"][1]["message"]
    assert "began" in record["stages"][2]["message"] and "stopped after 1 s" in record["stages"][2]["message"]
    assert "still run" in capsys.readouterr().out and "broken kernel" in (tmp_path / "gpu_check.log").read_text()
    monkeypatch.setattr(gpu_check, "stages", lambda out: {"good": stages["good"]})
    assert gpu_check.main() == 0


def test_gpu_check_stage_ends_with_its_children(tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True:\n    open({str(beats)!r}, 'a').write('x')\n    time.sleep(0.02)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with open(tmp_path / "log", "w") as log:
        outcome, _ = gpu_check.run_stage([sys.executable, "-c", code], 3, log)
    assert outcome == "red"
    count = beats.stat().st_size
    assert count > 0
    time.sleep(0.5)
    assert beats.stat().st_size == count
