"""The command line and doctor, each run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastconv
from fastconv import cli, doctor
from fastconv.models import MODELS
from fastconv.ops import _registry


def run(*args):
    return CliRunner().invoke(cli.app, list(args))


def python(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


def test_models_lists_the_bundle():
    result = run("models")
    assert result.exit_code == 0
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert list(rows) == list(MODELS)
    ops = ("depthwise_conv_norm,", "residual_scale,", "gelu_linear")
    assert rows["convnext_tiny"].split() == ["convnext_tiny", "ConvNeXt", "28.59", "4.46", "224", *ops]
    assert [line.split()[0] for line in run("models", "convnext_iso*").stdout.splitlines()[1:]] == fastconv.list_models("convnext_iso*")


def test_models_beside_what_is_published():
    """Every row of the paper's table, within rounding; EfficientNetV2-L has been counted at 53 to 56 GMACs."""
    result = run("models", "--published")
    assert result.exit_code == 0
    rows = [line.rsplit(maxsplit=6)[1:] for line in result.stdout.splitlines()[1:]]
    assert len(rows) == 29 and {name for *_, name in rows} <= set(MODELS)
    for _, params, counted, gmacs, counted_gmacs, name in rows:
        assert float(counted) == pytest.approx(float(params), rel=0.015), name
        assert float(counted_gmacs) == pytest.approx(float(gmacs), rel=0.06 if name == "efficientnetv2_l" else 0.021), name
    (row,) = (line.split() for line in run("models", "convnext_tiny", "--published").stdout.splitlines() if "224" in line)
    assert row == ["ConvNeXt-T", "224", "29", "28.59", "4.5", "4.46", "convnext_tiny"]


def test_models_of_other_libraries():
    assert run("models", "torchvision:convnext_*").stdout.split() == fastconv.list_models("torchvision:convnext_*")


@pytest.mark.parametrize(
    "args, message",
    [
        (("models", "nothing*"), "no model matches 'nothing*'"),
        (("models", "keras:*"), "unknown prefix 'keras'"),
        (("demo", "--dtype", "int8"), "dtype must be one of float32, bfloat16, float16"),
        (("demo", "--batch-size", "5"), "batch_size must be even"),
        (("demo", "--steps", "1"), "steps must be at least 2"),
        (("demo", "--data", "no/such/folder"), "data must be a folder"),
        (("demo", "--model", "convnext_tniy"), "did you mean convnext_tiny"),
        (("demo", "--model", "mae_vit_base_patch16"), "predicts pixels, not classes: use --pretrain"),
    ],
)
def test_bad_arguments_give_one_line(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_demo_without_the_device_says_so():
    assert "torch sees no CUDA device; use --device cpu" in run("demo", "--device", "cuda").stderr


def test_doctor_shows_every_op_and_backend(capsys):
    doctor.main()
    lines = capsys.readouterr().out.splitlines()
    facts = {line.split()[0]: line for line in lines if line}
    assert fastconv.__version__ in facts["fastconv"] and torch.__version__ in facts["torch"]
    for op in _registry.OPS:
        for backend in _registry.BACKENDS:
            (row,) = (line.split(maxsplit=2)[2] for line in lines if line.split()[:2] == [op, backend])
            assert row == (doctor.missing(op, backend) or "ok")
    assert doctor.missing("depthwise_conv", "eager") == ""


def test_doctor_gives_the_reason_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(_registry._library, "cpu_missing", "the CPU library is not built")
    assert doctor.missing("depthwise_conv", "cpu") == "the CPU library is not built"
    assert doctor.facts()["CPU kernels"] == "the CPU library is not built"
    monkeypatch.setattr(_registry._library, "cuda_missing", "the CUDA library is not built: a remedy")
    assert doctor.missing("depthwise_conv", "cuda") == doctor.facts()["CUDA kernels"] == "the CUDA library is not built: a remedy"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.missing("depthwise_conv", "triton") in ("torch sees no GPU", _registry.triton_missing())
    monkeypatch.setattr(_registry, "triton_missing", lambda: "triton is not installed (pip install triton)")
    assert doctor.missing("depthwise_conv", "triton") == "triton is not installed (pip install triton)"


def test_doctor_runs_without_the_extras():
    """As a module, with typer and rich hidden; the command then names the remedy in one line."""
    hide = "import sys; sys.modules.update(typer=None, rich=None)\n"
    plain = python(hide + "import runpy; runpy.run_module('fastconv.doctor', run_name='__main__')")
    assert plain.returncode == 0 and "depthwise_conv_norm" in plain.stdout, plain.stderr
    command = python(hide + "from fastconv.cli import main; main()")
    assert command.returncode == 1
    assert command.stderr.splitlines() == ['fastconv: the command line needs rich: pip install "fastconv[cli]"']


def test_demo_without_its_extra_names_the_remedy():
    result = python("import sys; sys.modules['sklearn.datasets'] = None; sys.argv[1:] = ['demo']\nfrom fastconv.cli import main; main()")
    assert result.returncode == 2
    assert result.stderr.splitlines() == ['fastconv: fastconv demo needs sklearn.datasets: pip install "fastconv[demo]"']


def test_bench_runs_pytest_on_the_checkout(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "pytest.ini").touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastconv" / "cli.py"))
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 3)
    assert run("bench", "-k", "convnext", "--quick").exit_code == 3
    assert calls == [[sys.executable, "-m", "pytest", str(tmp_path / "benchmarks"), "-k", "convnext", "--quick"]]
    (tmp_path / "benchmarks" / "pytest.ini").unlink()
    result = run("bench")
    assert result.exit_code == 2 and "clone the fastconv repository" in result.stderr


def test_the_installed_command():
    executable = Path(sys.executable).with_name("fastconv")
    result = subprocess.run([executable, "models", "convnext_tiny"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "28.59" in result.stdout
