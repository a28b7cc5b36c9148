"""The command line and doctor, each run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastconv
from fastconv import cli, doctor, published
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


# model and image: parameters in millions and GMACs as published, and as counted where they do not round to that
PUBLISHED_OTHERWISE = {
    ("regnety_160", 224): (84, 16.0, 83.59, 15.91),
    ("efficientnet_b7", 600): (66, 37.0, 66.35, 37.75),
    ("efficientnetv2_l", 480): (120, 53.0, 118.52, 56.08),
    ("efficientnetv2_xl", 480): (208, 94.0, 208.12, 82.05),
    ("convnext_base", 384): (89, 45.0, 88.59, 45.12),
}


def test_models_beside_what_is_published(monkeypatch):
    """Every row of the paper's table is what is counted, rounded, but for those above, whose notes say why."""
    counted, otherwise = {row: published.count(row) for row in published.TABLE}, {}
    for row, (params, gmacs) in counted.items():
        decimals = 1 if isinstance(row.params, float) else 0
        if (round(params, decimals), round(gmacs, 1)) != (row.params, row.gmacs):
            otherwise[row.name, row.size] = (row.params, row.gmacs, round(params, 2), round(gmacs, 2))
    assert otherwise == PUBLISHED_OTHERWISE
    assert {(row.name, row.size) for row in counted if row.note} == set(otherwise)
    monkeypatch.setattr(published, "count", counted.__getitem__)
    result = run("models", "--published")
    assert result.exit_code == 0
    for line, row in zip(result.stdout.splitlines()[1:], published.TABLE, strict=True):
        params, gmacs = counted[row]
        cells = [f"{row.params:g}", f"{params:.2f}", f"{row.gmacs:.1f}", f"{gmacs:.2f}", row.name]
        assert line.partition("; ")[0].split() == [*row.title.split(), str(row.size), *cells] and line.endswith(row.note)
    (line,) = (line for line in run("models", "convnext_tiny", "--published").stdout.splitlines() if "224" in line)
    assert line.split() == ["ConvNeXt-T", "224", "29", "28.59", "4.5", "4.46", "convnext_tiny"]


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
