"""`fastconv demo --pretrain` end to end on a tiny model, and that it fails when it should."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_demo import cells
from typer.testing import CliRunner

from fastconv import cli, demo
from fastconv.demo import Options, pretrain
from fastconv.demo.pretrain import Pretraining, Unlabelled
from fastconv.models import mae
from fastconv.models.convnextv2 import SIZES
from fastconv.models.fcmae import fcmae
from fastconv.ops import GlobalResponseNorm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def toy_model(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", ((1, 1, 1, 1), (16, 24, 32, 48)))
    monkeypatch.setattr(pretrain, "fcmae", partial(fcmae, decoder_dim=128))


def run_demo(tmp_path, *args, steps=8, size=64):
    common = ["--pretrain", "--model", "convnextv2_toy", "--batch-size", "8", "--steps", str(steps), "--image-size", str(size)]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["demo", *common, "--output", str(tmp_path / "pictures.png"), *args])


def test_digits_end_to_end(tmp_path):
    result = run_demo(tmp_path)
    assert result.exit_code == 0, result.output
    assert "5 of 5 blocks fused" in result.output and "global_response_norm  MaskedBlock  fused   cpu      4" in result.output
    eager, patched = ([float(v) for v in cell.split(", ")] for cell in cells(result.output, "loss, first and last"))
    assert eager == pytest.approx(patched, abs=1e-4) and eager[1] < eager[0]
    assert cells(result.output, "test loss")[0] == pytest.approx(cells(result.output, "test loss")[1])
    assert re.search(r"patched is \d+\.\d\dx as fast", result.output)
    picture = np.asarray(Image.open(tmp_path / "pictures.png").convert("RGB")).astype(int)
    assert picture.shape == (480, 1200, 3)
    gray = (np.abs(picture - 127) <= 1).all(-1)
    assert gray[160:320].mean() > 0.3 and gray[:160].mean() < 0.05 and gray[320:].mean() < 0.05, "only the second row hides patches"


def test_masked_autoencoder_end_to_end(tmp_path, monkeypatch):
    small = {"patch_size": 8, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    monkeypatch.setattr(mae, "mae_vit_toy", lambda **kw: mae.MaskedAutoencoder(48, 2, 2, **small, **kw), raising=False)
    monkeypatch.setitem(pretrain.MAES, "mae_vit_toy", 8)
    result = run_demo(tmp_path, "--model", "mae_vit_toy")
    assert result.exit_code == 0, result.output
    assert "3 of 3 blocks fused" in result.output and "mae_vit_toy pretraining" in result.output
    eager, patched = ([float(v) for v in cell.split(", ")] for cell in cells(result.output, "loss, first and last"))
    assert eager == pytest.approx(patched, abs=1e-4) and eager[1] < eager[0]
    picture = np.asarray(Image.open(tmp_path / "pictures.png").convert("RGB")).astype(int)
    gray = (np.abs(picture - 127) <= 1).all(-1)
    assert gray[160:320].mean() > 0.4 and gray[:160].mean() < 0.05 and gray[320:].mean() < 0.05, "only the second row hides patches"


def test_image_folder_end_to_end(tmp_path):
    digits = load_digits()
    for i, (image, digit) in enumerate(zip(digits.images[:40], digits.target)):
        (tmp_path / "digits" / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "digits" / str(digit) / f"{i}.png")
    result = run_demo(tmp_path, "--data", str(tmp_path / "digits"), "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "bfloat16" in result.output and (tmp_path / "pictures.png").is_file()


def test_a_broken_gradient_fails_the_demo(tmp_path, monkeypatch):
    right = GlobalResponseNorm.backward
    monkeypatch.setattr(GlobalResponseNorm, "backward", staticmethod(lambda ctx, dy: (0.9 * (g := right(ctx, dy))[0], *g[1:])))
    result = run_demo(tmp_path, steps=6)
    assert result.exit_code == 1
    assert re.search(r"FAILED: the losses differ by .* more than 10 times eager's own noise", result.output.replace("\n", " "))


def test_a_loss_that_does_not_fall_fails_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(Pretraining, "learning_rate", 0.0)
    losses = iter(range(1000))

    def loss(self, images, labels, right=Pretraining.loss):
        return right(self, images, labels) * 0 + next(losses)

    monkeypatch.setattr(Pretraining, "loss", loss)
    result = run_demo(tmp_path, steps=2)
    assert result.exit_code == 1 and "FAILED: the loss did not fall" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "convnext_tiny"), "model must be convnextv2_<atto"),
        (("--model", "mae_vit_huge_patch14"), "hides patches of 14x14: image_size must be a multiple"),
        (("--image-size", "48"), "image_size must be a multiple"),
        (("--image-size", "32"), "image_size must be a multiple"),
    ],
)
def test_bad_options(tmp_path, args, message):
    result = run_demo(tmp_path, *args)
    assert result.exit_code == 2 and message in result.output


def test_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "prepare", lambda options: seen.append(options) or (None, None))
    monkeypatch.setattr(demo, "demo", lambda *args: 0)
    for args in ([], ["--pretrain"]):
        assert CliRunner().invoke(cli.app, ["demo", *args]).exit_code == 0
    first, second = ((o.model, o.image_size, str(o.output), o.pretrain) for o in seen)
    assert first == ("convnext_tiny", 64, "fastconv-demo.png", False)
    assert second == ("convnextv2_atto", 128, "fastconv-pretrain.png", True)


def test_batches_and_masks_can_be_replayed():
    options = Options(model="convnextv2_toy", batch_size=4, steps=4, image_size=64, pretrain=True)
    data, model = demo.prepare(options)
    assert isinstance(data, Unlabelled) and model.training
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for n, p in model.named_parameters() if n.endswith("grn.gamma"))
    images, _ = data.batch(3)
    assert images.shape == (4, 3, 64, 64) and torch.equal(images, data.batch(3)[0]) and not torch.equal(images, data.batch(4)[0])
    runs = []
    for name in "ab":
        data, model = demo.prepare(options)
        runs.append(demo.start(name, model, options, "contiguous"))
        assert isinstance(runs[-1], Pretraining)
        for number in range(3):
            runs[-1].step(number, *data.batch(number))
    assert runs[0].losses == runs[1].losses and len(set(runs[0].losses)) == 3
