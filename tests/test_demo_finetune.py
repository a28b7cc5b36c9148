"""`fastconv demo --finetune`: what learns and what does not, the classes before and after, weights of one's own."""

import copy

import pytest
import timm
import torch
from test_demo import bundle, cells, tiny, write_images
from torch import nn
from typer.testing import CliRunner

import fastconv
from fastconv import cli, demo
from fastconv.demo import Options
from fastconv.demo.data import Images
from fastconv.demo.finetune import FineTuning, freeze, head, stages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    bundle(monkeypatch, tiny)


def options(**kw):
    return Options(**{"model": "tiny", "batch_size": 8, "steps": 4, "image_size": 32, "finetune": "last-1", **kw})


def run_demo(tmp_path, *args):
    common = ["--model", "tiny", "--batch-size", "8", "--steps", "4", "--image-size", "32", "--output", str(tmp_path / "curves.png")]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["demo", *common, *args])


@pytest.mark.parametrize("wanted", ["linear", *(pytest.param(w, marks=pytest.mark.slow) for w in ("last-2", "all"))])
def test_end_to_end(tmp_path, wanted):
    result = run_demo(tmp_path, "--finetune", wanted)
    assert result.exit_code == 0, result.output
    assert f"tiny fine-tuning ({wanted}), float32" in result.output and "5 of 5 blocks fused" in result.output
    eager, patched = ([float(v) for v in cell.split(", ")] for cell in cells(result.output, "loss, first and last"))
    assert eager == pytest.approx(patched, abs=1e-4)


def test_it_starts_from_what_was_learnt_and_the_head_is_new():
    data, model = demo.prepare(options())
    assert data.classes == ["5", "6", "7", "8", "9"] and {label for _, label in data.test} == set(range(5))
    fresh = demo.build(options(), 5)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, fresh.get_parameter(n))]
    assert set(moved) == {n for n, _ in fresh.named_parameters()} - {"head.bias"}, "four steps on the first five digits move everything"
    assert model.head.out_features == 5 and not model.head.bias.any()
    assert not any(p.grad is not None for p in model.parameters())
    again = demo.prepare(options())[1]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("wanted", "learning"),
    [
        ("linear", ("head.",)),
        ("last-1", ("stages.3.", "downsample_layers.3.", "norm.", "head.")),
        ("last-2", ("stages.2.", "stages.3.", "downsample_layers.2.", "downsample_layers.3.", "norm.", "head.")),
        ("all", ("",)),
    ],
)
def test_only_what_is_asked_for_learns(wanted, learning):
    data, model = demo.prepare(options(finetune=wanted))
    before = copy.deepcopy(model.state_dict())
    fastconv.patch(model)
    run = demo.start("patched", model, options(finetune=wanted), "channels_last")
    assert isinstance(run, FineTuning)
    for number in range(3):
        run.step(number, *data.batch(number))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, _ in model.named_parameters() if n.startswith(learning)}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Linear):
            assert module.training == any(f"{name}.weight".startswith(part) for part in learning), name


def test_stages_of_other_libraries():
    for name, count in (("resnet18", 4), ("swin_tiny_patch4_window7_224", 4), ("vit_tiny_patch16_224", 12), ("convnext_atto", 4)):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert len(stages(model)) == count, name
        freeze(model, "last-1")
        learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert {"resnet18": {"layer4", "fc"}, "vit_tiny_patch16_224": {"blocks", "norm", "head"}}.get(name, learning) == learning
        assert head(model)[0] in {n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad}
        assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < sum(p.numel() for p in model.parameters())


def test_frozen_statistics_rest():
    model = timm.create_model("resnet18", num_classes=3)
    freeze(model, "last-1")
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 64, 64))
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed and all(n.startswith("layer4.") for n in changed)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_weights_of_ones_own(tmp_path, wrap):
    torch.manual_seed(1)
    source = tiny(num_classes=7)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    data, model = demo.prepare(options(weights=tmp_path / "weights.pt", finetune="linear"))
    assert len(data.classes) == 10 and model.head.out_features == 10
    for name, value in source.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, model.state_dict()[name]), name


def test_weights_of_another_model(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    result = run_demo(tmp_path, "--finetune", "all", "--weights", str(tmp_path / "weights.pt"))
    assert result.exit_code == 2 and "weights.pt is of another model: missing" in result.output
    torch.save({"stages.0.0.gamma": torch.zeros(3)}, tmp_path / "weights.pt")
    result = run_demo(tmp_path, "--finetune", "all", "--weights", str(tmp_path / "weights.pt"))
    assert result.exit_code == 2 and "does not fit the model" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--finetune", "last-0"), "finetune must be linear, all or last-N"),
        (("--finetune", "head"), "finetune must be linear, all or last-N"),
        (("--finetune", "last-5"), "finetune=last-5, but the model has 4 stages"),
        (("--finetune", "all", "--pretrain"), "choose one"),
        (("--weights", "x.pt"), "add --finetune"),
        (("--finetune", "all", "--weights", "none.pt"), "No such file"),
    ],
)
def test_bad_options(tmp_path, args, message):
    result = run_demo(tmp_path, *args)
    assert result.exit_code == 2 and message in result.output


def test_halves_of_folders(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, ["a", "b", "c"], 4)
    first, second = (Images(tmp_path, 16, 4, 0, half=half) for half in (0, 1))
    assert (first.classes, second.classes) == (["a"], ["b", "c"])
    assert (len(first.order), len(first.test), len(second.order), len(second.test)) == (4, 4, 8, 8)
    assert {first.images[i][1] for i in first.order} == {0} and {second.images[i][1] for i in second.order} == {0, 1}
    assert second.batch(0)[1].shape == (4, 2)
