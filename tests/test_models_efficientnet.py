"""EfficientNet and EfficientNetV2."""

import pytest
import timm
import torch
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from torch import nn

from fastconv.models import MODELS, efficientnet
from fastconv.models.efficientnet import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image at the published resolution
COUNTS = {
    "efficientnet_b0": (5_288_548, 385_814_752),
    "efficientnet_b1": (7_794_184, 686_802_832),
    "efficientnet_b2": (9_109_994, 993_561_872),
    "efficientnet_b3": (12_233_232, 1_827_141_392),
    "efficientnet_b4": (19_341_616, 4_393_771_024),
    "efficientnet_b5": (30_389_784, 10_266_384_752),
    "efficientnet_b6": (43_040_704, 19_067_593_536),
    "efficientnet_b7": (66_347_960, 37_745_884_192),
    "efficientnetv2_s": (21_458_488, 8_365_617_152),
    "efficientnetv2_m": (54_139_356, 24_582_460_384),
    "efficientnetv2_l": (118_515_272, 56_079_699_008),
    "efficientnetv2_xl": (208_119_808, 52_529_254_400),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize(
    "name, turned", [("efficientnet_b0", "blocks.2.1.se.conv_expand.weight"), ("efficientnetv2_s", "blocks.1.2.conv_exp.weight")]
)
def test_parity_with_timm(name, turned):
    ours = randomize(getattr(efficientnet, name)(num_classes=10))
    theirs = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 64)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


def small(**kw):
    """Every kind of block, with and without the sum."""
    stages = [Stage("conv", 2, 3, 1, 1, 16), Stage("fused", 2, 3, 2, 4, 24), Stage("ds", 2, 3, 1, 1, 24), Stage("ir", 2, 5, 2, 6, 40)]
    return efficientnet.EfficientNet(stages, 16, 64, num_classes=5, **kw)


def test_one_step_reaches_every_parameter():
    check_trains(small(), 32)


def test_stochastic_depth_grows_and_acts_in_training_only():
    model = small(drop_path_rate=0.4).train()
    blocks = [block for stage in model.blocks for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(8)])
    x = images(8, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x), model(x))
    drop = efficientnet.DropPath(0.25).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2, 2, 2))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))  # one value an image
    assert abs((out == 0).double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(drop.eval()(out), out)


def test_channels_and_initialisation():
    torch.manual_seed(0)
    model = small(in_chans=1, drop_rate=0.5)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    block = model.blocks[3][1]
    assert abs(block.conv_dw.weight.std().item() - (2 / 25) ** 0.5) < 0.01  # a depthwise filter's fan out is its 25 taps
    assert not block.se.conv_expand.bias.any()
    assert model.classifier.weight.abs().max() <= 5**-0.5
    x = images(2, 1, 32, 32)
    assert not torch.equal(model(x), model(x))  # dropout


def test_compound_scaling():
    """Depth rounds up, width to multiples of 8, no width falls by more than a tenth."""
    assert [efficientnet._round_channels(c) for c in (4, 17.6, 19.2, 26.4, 38.4, 1408)] == [8, 16, 24, 24, 40, 1408]
    for name, depth, width in (("efficientnet_b0", 16, 320), ("efficientnet_b4", 32, 448), ("efficientnet_b7", 55, 640)):
        model = build_meta(name)
        assert sum(len(stage) for stage in model.blocks) == depth
        assert model.conv_head.in_channels == width


def test_lecture_depthwise_separable_cost():
    """A depthwise and a 1x1 convolution against a full one of the same shape: 1/C2 + 1/K^2 of the arithmetic, read off a block."""
    block = efficientnet.DepthwiseSeparable(48, 64, 3, 1, 1, 0.0)
    full = nn.Conv2d(48, 64, 3, bias=False)
    separable = block.conv_dw.weight.numel() + block.conv_pw.weight.numel()  # multiply-accumulates a place
    assert separable / full.weight.numel() == pytest.approx(1 / 64 + 1 / 9)


@pytest.mark.parametrize("name, resolution, params, gmacs", [("efficientnet_b7", 600, 66, 37.0), ("efficientnetv2_l", 480, 120, 53.0)])
def test_lecture_rows_beside_convnext(name, resolution, params, gmacs):
    """The papers round down and leave small layers out: 2% on parameters and 6% on arithmetic."""
    spec = MODELS[name]
    assert spec.resolution == resolution
    assert COUNTS[name][0] / 1e6 == pytest.approx(params, rel=0.02)
    assert COUNTS[name][1] / 1e9 == pytest.approx(gmacs, rel=0.06)
