"""The benchmarks run, say what they measured, and measure nothing that is wrong."""

import argparse
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

import bench_models  # noqa: E402
import gpu  # noqa: E402
import gpu_check  # noqa: E402
import interleaved  # noqa: E402
from gpu import checks, sanitizer  # noqa: E402

CPU = torch.device("cpu")


def bench(tmp_path, *args, timeout=300, **environment):
    """`pytest benchmarks --smoke ...` in a process of its own, and the rows that it filed."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--smoke", "--device=cpu", "--seconds=0.05", f"--out={tmp_path}", *args]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=timeout
    )
    path = tmp_path / "benchmarks.json"
    return result, json.loads(path.read_text()) if path.exists() else None


def test_ops_end_to_end(tmp_path):
    result, record = bench(tmp_path, "--no-compile", "-k", "depthwise_conv_norm or residual_scale")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
    assert record["torch"] == torch.__version__ and "--smoke" in record["command"] and record["date"] and record["commit"]
    assert record["environment"]["OMP_NUM_THREADS"] == "1"
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
    names = ("timm:convnext_atto", "timm:test_convnext")
    result, record = bench(tmp_path, "--no-compile", "-k", "test_model", "--model", names[0], "--model", names[1])
    assert result.returncode == 0, result.stdout + result.stderr
    assert {r["case"].split()[0] for r in record["rows"]} == set(names)
    modes = {(r["case"].split()[-1], r["entrant"]) for r in record["rows"]}
    layouts = ("NCHW", "channels_last")
    assert modes == {(mode, f"{who} {layout}") for mode in ("training", "inference") for who in ("eager", "ours") for layout in layouts}


def test_gate_of_models_drops_nothing():
    """Of a model with dropout the gate would else compare two draws, and pass or fail by chance."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    x, target = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    entrant = bench_models.Entrant(model, x, target, "NCHW", training=True, fused=False, compile=False)
    exact = bench_models.truth(model, x, target, training=True)
    for name, actual in entrant.results().items():
        assert bench_models.relative(actual, exact[name]) < 1e-5, name
    assert entrant.model[1].p == 0.5 == model[1].p


@pytest.mark.slow
def test_with_compile(tmp_path):
    result, record = bench(tmp_path, "--model", "timm:convnext_atto", timeout=1800)  # the compiler takes minutes beside other stages
    assert result.returncode == 0, result.stdout + result.stderr
    cases = {r["case"] for r in record["rows"] if r.get("op") != "linear"}  # two of torch's own kernels, with nothing to compile
    assert len(cases) >= 5
    for case in cases:
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
@pytest.mark.parametrize(
    ("stage", "message"),
    (
        ("", "sees no CUDA device: nothing was checked"),
        ("STAGE=bench,probe", "sees no CUDA device: nothing was checked"),
        ("STAGE=probe,prove", "unknown stage prove; use probe, test, sanitize, graph, bench"),
    ),
)
def test_gpu_check_without_a_gpu(tmp_path, stage, message):
    out = tmp_path / "out"
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"OUT={out}", *([stage] if stage else [])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert message in result.stderr
    assert not out.exists()


def test_gpu_check_stage_names():
    assert gpu_check.stage_names("graph, test") == ["test", "graph"]  # in the order that they run in
    for wrong in ("", ",", "prove", "probe,prove", "Probe"):
        with pytest.raises(argparse.ArgumentTypeError, match="unknown stage"):
            gpu_check.stage_names(wrong)


def test_gpu_check_steps_are_there(tmp_path):
    """Every command names a check that exists; names of steps are results' names, and these are few."""
    steps = [step for stage in gpu_check.STAGES for step in gpu_check.steps_of(stage, tmp_path / "out", tmp_path / "scratch")]
    modules = [step.command[2:] for step in steps if step.command[1] == "-m" and step.command[2].startswith("gpu.")]
    assert {args[1] for args in modules if args[0] == "gpu.checks"} == set(checks.CHECKS)
    assert {args[1] for args in modules if args[0] == "gpu.sanitizer"} == set(sanitizer.PLANTED)
    assert {args[0] for args in modules} == {"gpu.probes", "gpu.checks", "gpu.sanitizer"}
    assert len({step.name for step in steps}) == len(steps) and all(step.seconds < gpu_check.STAGE_S for step in steps)
    files = [arg for step in steps for arg in step.command if isinstance(arg, pathlib.Path) and tmp_path in arg.parents]
    assert {path.name for path in files} == {"bench_cuda", "bench_triton", "bench_models", "demo.png"}
    assert len(files) + len(("gpu_check.json", "gpu_check.log", "gpu_check.txt")) <= 8
    assert gpu_check.RECORDED == gpu.RECORDED


def python(code):
    return [sys.executable, "-c", code]


GOOD = gpu_check.Step("good", 30, python("print('fine')"))
BAD = gpu_check.Step("bad", 30, python("import sys; sys.exit('broken kernel')"))
HANGS = gpu_check.Step("hangs", 1, python("import time; print('began', flush=True); time.sleep(60)"))
UNTRIED = gpu_check.Step("untried", 30, python(f"import sys; print('no such tool'); sys.exit({gpu_check.RECORDED})"))
LAST = gpu_check.Step("last", 30, python("print('still run')"))


@pytest.fixture
def gpu_check_of(tmp_path, monkeypatch):
    """gpu_check.main() on these steps of stages; returns its exit status and gpu_check.json."""
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "build_steps", lambda: [GOOD._replace(name="build")])

    def call(stages, *args):
        monkeypatch.setattr(
            gpu_check, "steps_of", lambda stage, out, scratch: stages(scratch) if callable(stages) else stages.get(stage, [GOOD])
        )
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *args])
        return gpu_check.main(), json.loads((tmp_path / "gpu_check.json").read_text())

    return call


def test_gpu_check_records_each_step(tmp_path, capsys, gpu_check_of):
    """One step that fails or hangs is recorded and stops neither the next nor the next stage; the whole is red."""
    start = time.monotonic()
    status, record = gpu_check_of({"test": [GOOD, BAD, HANGS, LAST], "graph": [UNTRIED]}, "--stage", "graph,test,probe")
    assert status == 1
    assert time.monotonic() - start < 20
    assert record["command"].endswith("STAGE=probe,test,graph")
    probe, test, graph = record["stages"]
    assert [(s["stage"], s["outcome"]) for s in record["stages"]] == [("probe", "green"), ("test", "red"), ("graph", "recorded")]
    assert [row["step"] for row in probe["steps"]] == ["build", "good"]  # built once, before all
    assert [row["outcome"] for row in test["steps"]] == ["green", "red", "red", "green"]
    assert "broken kernel" in test["steps"][1]["message"]
    assert "began" in test["steps"][2]["message"] and "stopped after 1 s" in test["steps"][2]["message"]
    assert graph["steps"][0]["message"] == "no such tool"
    assert "still run" in capsys.readouterr().out and "broken kernel" in (tmp_path / "gpu_check.log").read_text()
    assert "  hangs               red" in (tmp_path / "gpu_check.txt").read_text()


def test_gpu_check_is_red_only_where_something_is(gpu_check_of):
    assert gpu_check_of({}, "--stage", "probe")[0] == 0
    status, record = gpu_check_of({"sanitize": [UNTRIED, GOOD]}, "--stage", "sanitize")
    assert status == 0 and record["stages"][0]["outcome"] == "recorded"
    status, record = gpu_check_of({stage: [UNTRIED] for stage in gpu_check.STAGES[1:]})
    assert status == 0 and [s["stage"] for s in record["stages"]] == list(gpu_check.STAGES)


def test_gpu_check_stage_ends_in_its_time(monkeypatch, gpu_check_of):
    monkeypatch.setattr(gpu_check, "STAGE_S", 6)
    slow = GOOD._replace(command=python("import time; time.sleep(60)"))
    status, record = gpu_check_of({"test": [slow, GOOD]}, "--stage", "test,graph")
    test, graph = record["stages"]
    assert status == 1 and test["seconds"] < 12
    assert [row["outcome"] for row in test["steps"]] == ["green", "red", "red"]
    assert test["steps"][2]["message"] == "no time was left"
    assert graph["outcome"] == "green"  # a stage has its own time


def test_gpu_check_takes_what_a_failed_benchmark_measured(tmp_path, gpu_check_of):
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'benchmarks.json').write_text('[1]'); sys.exit(1)"

    def stages(scratch):
        return [gpu_check.Step("bench_x", 30, [*python(code), scratch / "bench_x"]), GOOD]

    assert gpu_check_of(stages, "--stage", "bench")[0] == 1
    assert (tmp_path / "bench_x.json").read_text() == "[1]"


def test_gpu_check_stage_ends_with_its_children(tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True:\n    open({str(beats)!r}, 'a').write('x')\n    time.sleep(0.02)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with open(tmp_path / "log", "w") as log:
        outcome, _ = gpu_check.run_step([sys.executable, "-c", code], 3, log)
    assert outcome == "red"
    count = beats.stat().st_size
    assert count > 0
    time.sleep(0.5)
    assert beats.stat().st_size == count
