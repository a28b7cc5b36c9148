"""MobileNet V1, V2 and V3."""

import pytest
import timm
import torch
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastconv.models import mobilenet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "mobilenetv1_100": (4_231_976, 568_740_352),
    "mobilenetv2_100": (3_504_872, 300_774_272),
    "mobilenetv2_140": (6_108_776, 582_195_824),
    "mobilenetv3_large_100": (5_483_032, 216_589_760),
    "mobilenetv3_small_100": (2_542_856, 56_510_400),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize(
    "name, turned",
    [
        ("mobilenetv1_100", "blocks.3.2.conv_dw.weight"),
        ("mobilenetv2_100", "blocks.2.1.conv_pwl.weight"),
        ("mobilenetv3_large_100", "blocks.5.1.se.conv_expand.weight"),  # SE in some stages, both activations
        ("mobilenetv3_small_100", "blocks.0.0.se.conv_reduce.weight"),  # SE in the separable block too
    ],
)
def test_parity_with_timm(name, turned):
    ours = randomize(getattr(mobilenet, name)(num_classes=10))
    theirs = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 64)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100"])
def test_one_step_reaches_every_parameter(name):
    check_trains(getattr(mobilenet, name)(num_classes=5), 64, batch=16)


def test_activations_and_shapes_of_the_versions():
    """The thin end is linear and summed in V2 and V3; V1 has an activation there and no sums."""
    for name, act in (("mobilenetv1_100", nn.ReLU6), ("mobilenetv2_100", nn.ReLU6), ("mobilenetv3_large_100", nn.Hardswish)):
        model = build_meta(name)
        assert type(model.act1) is act
        separable = model.blocks[0][0]
        assert isinstance(separable.act2, act if name == "mobilenetv1_100" else nn.Identity)
        skips = [block.has_skip for stage in model.blocks for block in stage if hasattr(block, "has_skip")]
        assert any(skips) == (name != "mobilenetv1_100")
    assert isinstance(build_meta("mobilenetv3_large_100").blocks[1][0].act1, nn.ReLU)  # the early stages of V3
    model = mobilenet.mobilenetv3_small_100(in_chans=1, num_classes=7, drop_rate=0.5)
    x = images(2, 1, 64, 64)
    assert model(x).shape == (2, 7) and not torch.equal(model(x), model(x))
    assert model.forward_features(x).shape == (2, 576, 2, 2)


def macs(module, x):
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2


def test_lecture_depthwise_separable_cost():
    """A depthwise and a 1x1 convolution cost 1/C2 + 1/K^2 of the full one that they replace: 8 to 9 times less at 3x3."""
    for stage in build_meta("mobilenetv1_100").blocks:
        for block in stage:
            c1, c2, stride = block.conv_dw.in_channels, block.conv_pw.out_channels, block.conv_dw.stride
            x = torch.empty(1, c1, 14, 14, device="meta")
            full = nn.Conv2d(c1, c2, 3, stride=stride, padding=1, bias=False, device="meta")
            separable = macs(block.conv_dw, x) + macs(block.conv_pw, block.conv_dw(x))
            assert separable / macs(full, x) == pytest.approx(1 / c2 + 1 / 9)
            assert 7.8 < macs(full, x) / separable < 9
