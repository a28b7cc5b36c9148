"""`fastconv demo` end to end on a tiny model, and that it fails when it should."""

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fastconv
from fastconv import cli, demo
from fastconv.demo import Options
from fastconv.demo.data import Images
from fastconv.demo.run import Run, build
from fastconv.models import MODELS, Spec, convnext
from fastconv.ops import DepthwiseConvNorm


def tiny(**kw):
    model = convnext.ConvNeXt((1, 1, 2, 1), (16, 24, 32, 48), **kw)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(4)  # as much as in the wide models: the branches must reach the loss
    return model


def bundle(monkeypatch, build):
    """Make `build` the bundled model "tiny"."""
    monkeypatch.setattr(convnext, "tiny", build, raising=False)
    monkeypatch.setitem(MODELS, "tiny", Spec("tiny", "convnext", "ConvNeXt", 0.0, 0.0, 32, ()))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    bundle(monkeypatch, tiny)


def run_demo(tmp_path, *args, steps=4):
    common = ["--model", "tiny", "--batch-size", "8", "--steps", str(steps), "--image-size", "32", "--output", str(tmp_path / "curves.png")]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["demo", *common, *args])


def check_curves(path):
    """Both halves of the picture show both runs: matplotlib's first two colours."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape == (450, 1200, 3)
    for half in (picture[:, :600], picture[:, 600:]):
        for colour in ((31, 119, 180), (255, 127, 14)):
            assert (np.abs(half - colour).sum(-1) < 30).sum() > 50


def cells(output, row):
    """The cells of a row of the final table."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"│ {row}"))
    return [cell.strip() for cell in line.split("│")[2:4]]


def test_digits_end_to_end(tmp_path):
    result = run_demo(tmp_path)
    assert result.exit_code == 0, result.output
    assert "5 of 5 blocks fused" in result.output and "FAILED" not in result.output
    rates, medians = [[float(v) for v in cells(result.output, row)] for row in ("images/s", "step, median")]
    assert [8e3 / ms for ms in medians] == pytest.approx(rates, rel=0.05)
    assert all(float(v) > 0.1 for v in cells(result.output, "memory of a step"))
    assert cells(result.output, "memory format")[1] == "channels_last"
    eager, patched = cells(result.output, "loss, first and last")
    assert [float(v) for v in eager.split(", ")] == pytest.approx([float(v) for v in patched.split(", ")], abs=1e-4)
    assert all(re.fullmatch(r"\d+\.\d%", v) for v in cells(result.output, "test accuracy"))
    assert re.search(r"patched is \d+\.\d\dx as fast", result.output)
    assert re.search(r"largest loss difference \d\.\de-\d\d; eager with \d+ threads? instead of \d+ differs from itself by", result.output)
    check_curves(tmp_path / "curves.png")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_end_to_end(tmp_path, dtype):
    result = run_demo(tmp_path, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"tiny, {dtype}" in result.output


def write_images(root, classes, count, size=(40, 30)):
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (*size, 3)) + 75 * c
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


def test_image_folder_end_to_end(tmp_path):
    write_images(tmp_path / "pictures", ["dark", "light"], 12)
    result = run_demo(tmp_path, "--data", str(tmp_path / "pictures"), steps=2)
    assert result.exit_code == 0, result.output
    check_curves(tmp_path / "curves.png")


def scale_gradient(index, factor):
    def broken(grads):
        grads[index] = None if grads[index] is None else grads[index] * factor
        return grads

    return broken


def mirror_taps(grads):
    grads[1] = grads[1].flip(-1)
    return grads


@pytest.mark.parametrize(
    "broken",
    [scale_gradient(0, 0), scale_gradient(1, 0), scale_gradient(2, 0), scale_gradient(3, 0), scale_gradient(4, 0), mirror_taps],
    ids=["dx", "dweight", "dbias", "dnorm_weight", "dnorm_bias", "mirrored taps"],
)
def test_a_broken_gradient_fails_the_demo(tmp_path, monkeypatch, broken):
    right = DepthwiseConvNorm.backward
    monkeypatch.setattr(DepthwiseConvNorm, "backward", staticmethod(lambda ctx, *grads: tuple(broken(list(right(ctx, *grads))))))
    result = run_demo(tmp_path, steps=6)
    assert result.exit_code == 1
    assert re.search(r"FAILED: the losses differ by .* more than 10 times eager's own noise", result.output.replace("\n", " "))


def test_an_unfused_block_fails_the_demo(tmp_path, monkeypatch):
    def unnormalised(**kw):
        model = tiny(**kw)
        model.stages[2][0].norm = nn.LayerNorm(32, elementwise_affine=False)
        return model

    bundle(monkeypatch, unnormalised)
    result = run_demo(tmp_path, steps=2)
    assert result.exit_code == 1
    assert "FAILED: 1 of 5 blocks are not fused" in result.output and "has no weight or no bias" in result.output


def test_a_fallback_fails_the_demo(tmp_path, monkeypatch):
    def hooked(**kw):
        model = tiny(**kw)
        model.stages[2][0].dwconv.register_forward_hook(lambda *args: None)
        return model

    bundle(monkeypatch, hooked)
    with pytest.warns(RuntimeWarning, match="hook"):
        result = run_demo(tmp_path, steps=2)
    assert result.exit_code == 1
    assert "FAILED: calls ran eager code: a hook sits on dwconv" in result.output


def test_eager_code_in_fused_blocks_fails_the_demo(tmp_path):
    with fastconv.use_backend("eager"):
        result = run_demo(tmp_path, steps=2)
    assert result.exit_code == 1 and "FAILED: calls ran eager code" in result.output


def test_a_model_without_known_blocks_fails_the_demo(tmp_path, monkeypatch):
    def plain(num_classes, drop_path_rate):
        return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(4 * 8 * 8, num_classes))

    bundle(monkeypatch, plain)
    result = run_demo(tmp_path, steps=2)
    assert result.exit_code == 1 and "has no block that fastconv recognises" in result.output


def test_a_model_without_stochastic_depth_and_with_an_auxiliary_head(monkeypatch):
    class Two(nn.Linear):
        def forward(self, x):
            logits = super().forward(x.flatten(1))
            return (logits, torch.zeros_like(logits)) if self.training else logits

    bundle(monkeypatch, lambda num_classes: Two(12, num_classes))
    options, images = Options(model="tiny"), torch.randn(2, 3, 2, 2)
    model = build(options, 4)
    torch.manual_seed(options.seed)
    assert torch.equal(model.weight, Two(12, 4).weight)
    run = Run("eager", model, options, "contiguous")
    assert torch.equal(run.logits(images), model.eval()(images))
    bundle(monkeypatch, lambda classes: None)
    with pytest.raises(TypeError, match="num_classes"):
        build(options, 4)


def compared(eager, patched, control):
    runs = [
        SimpleNamespace(losses=losses, model=nn.Identity(), seconds=[s, s, s])
        for losses, s in ((eager, 3.0), (patched, 2.0), (control, 9.0))
    ]
    return demo.Comparison(Options(), *runs, "with 1 thread instead of 2")


def test_the_verdict_on_losses():
    def failed(*losses):
        return any("losses differ" in problem for problem in compared(*losses).problems())

    result = compared([2.0, 1.0], [2.0, 1.0004], [2.0001, 1.0])
    assert result.speedup == 1.5
    assert result.difference == pytest.approx(4e-4) and result.noise == pytest.approx(1e-4)
    assert not failed([2.0, 1.0], [2.0, 1.0009], [2.0001, 1.0])
    assert failed([2.0, 1.0], [2.0, 1.0011], [2.0001, 1.0])
    assert not failed([2.0, 1.0], [2.0, 1.0 + 4.7e-6], [2.0, 1.0])  # a silent control is credited with two roundings of the loss
    assert failed([2.0, 1.0], [2.0, 1.0 + 4.9e-6], [2.0, 1.0])
    assert failed([2.0, 1.0], [2.0, math.nan], [2.0, 1.0])
    assert failed([2.0, 1.0], [2.0, 1.0], [2.0, math.nan])


def test_batches_can_be_replayed():
    data = Images(None, image_size=16, batch_size=8, seed=3)
    images, labels = data.batch(5)
    again = Images(None, image_size=16, batch_size=8, seed=3)
    again.batch(2)
    assert all(torch.equal(a, b) for a, b in zip((images, labels), again.batch(5)))
    assert images.shape == (8, 3, 16, 16) and labels.shape == (8, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert labels.min() >= 0.01 - 1e-6  # smoothed by 0.1 over 10 classes
    assert not torch.equal(images, data.batch(6)[0])
    assert not torch.equal(images, Images(None, image_size=16, batch_size=8, seed=4).batch(5)[0])


def test_test_images_are_held_out(tmp_path):
    data = Images(None, image_size=16, batch_size=8, seed=0)
    assert (len(data.order), len(data.test)) == (1438, 359)
    trained = {id(data.images[i][0]) for i in data.order}
    assert not trained & {id(image) for image, _ in data.test}
    batches = list(data.test_batches())
    assert sum(len(labels) for _, labels in batches) == 359 and batches[-1][0].shape == (7, 3, 16, 16)

    write_images(tmp_path / "train", ["a", "b"], 5)
    write_images(tmp_path / "val", ["a", "b"], 2)
    data = Images(tmp_path, image_size=16, batch_size=4, seed=0)
    assert (len(data.order), len(data.test), data.classes) == (10, 4, ["a", "b"])
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(ValueError, match="val must hold the classes of"):
        Images(tmp_path, image_size=16, batch_size=4, seed=0)


def test_a_folder_with_too_few_images_is_refused(tmp_path):
    write_images(tmp_path, ["a"], 3)
    with pytest.raises(ValueError, match="too few images"):
        Images(tmp_path, image_size=16, batch_size=4, seed=0)


@pytest.fixture
def prepared():
    options = Options(model="tiny", batch_size=4, steps=4, image_size=32)
    return options, *demo.prepare(options)


def test_the_model_is_sensitive_to_its_convolutions(prepared):
    _, data, model = prepared
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 5 and all(torch.equal(g, torch.full_like(g, 0.5)) for g in gammas)
    assert model.stages[3][0].drop_path.drop_prob == pytest.approx(0.1)
    assert model.training and model.head.out_features == len(data.classes)


def test_rehearsals_leave_no_trace(prepared):
    options, data, model = prepared
    run = Run("eager", model, options, "contiguous", threads=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    assert run.rehearse(*data.batch(0)) > 0
    run.measure_memory(*data.batch(0))
    # at least the activations that the first block's expanding layer keeps: 4 images of 8x8 pixels and 64 channels
    assert 4 * 8 * 8 * 64 * 4 < run.peak_bytes < 2**30
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not run.losses and not run.seconds and torch.get_num_threads() == threads


def test_steps_replay_and_learn(prepared):
    """Two runs from the same weights walk the same path, random depth included, and AdamW's step is taken."""
    options, data, model = prepared
    first = Run("a", model, options, "contiguous")
    before = model.head.weight.detach().clone()
    second = Run("b", copy.deepcopy(model), options, "contiguous")
    for number in range(3):
        batch = data.batch(number)
        first.step(number, *batch)
        second.step(number, *batch)
    assert first.losses == second.losses and len(set(first.losses)) == 3
    moved = (model.head.weight - before).abs().max()
    assert 1e-5 < moved < 1e-2
    rates = [second.schedule.get_last_lr()[0]]
    second.step(3, *data.batch(3))
    assert second.schedule.get_last_lr()[0] < rates[0]  # cosine


def test_the_faster_layout_is_found(prepared, monkeypatch):
    options, data, model = prepared
    for slow, fast in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        monkeypatch.setattr(Run, "rehearse", lambda run, *batch, slow=slow: 2.0 if run.layout == slow else 1.0)
        assert demo.faster_layout(model, options, data.batch(0)) == fast


def test_the_control_is_changed_as_it_says(prepared):
    options, _, model = prepared
    control, change = demo.make_control(copy.deepcopy(model), options, "contiguous")
    threads = torch.get_num_threads()
    assert control.threads != threads and change.endswith(f"instead of {threads}")
    low = Options(model="tiny", dtype="bfloat16")
    control, change = demo.make_control(copy.deepcopy(model), low, "contiguous")
    assert change == "with weights perturbed by 1e-7" and control.threads == threads
    drift = [(a - b).norm() / b.norm() for a, b in zip(control.model.parameters(), model.parameters()) if b.dim() > 1]
    assert all(1e-8 < d < 3e-7 for d in drift)
