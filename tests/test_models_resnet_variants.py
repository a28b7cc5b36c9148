"""SENet-154 and ResNet-RS."""

import pytest
import timm
import torch
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from torch import nn

from fastconv.models import resnet_rs, senet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image at the published resolution
COUNTS = {
    "senet154": (115_088_984, 20_688_363_520),
    "resnetrs50": (35_691_912, 2_278_629_376),
    "resnetrs101": (63_618_696, 6_012_157_952),
    "resnetrs152": (86_621_576, 15_527_886_848),
    "resnetrs200": (93_209_992, 20_093_386_752),
    "resnetrs270": (129_861_448, 26_950_189_056),
    "resnetrs350": (163_956_168, 43_493_793_792),
    "resnetrs420": (191_891_656, 63_942_344_704),
}
LONG = [pytest.param(n, marks=pytest.mark.slow) if n in ("resnetrs270", "resnetrs350") else n for n in COUNTS]
DEPTHS = (2, 1, 1, 1)  # a block with and one without a projection
SMALL = {"senet154": lambda **kw: senet.SENet(DEPTHS, **kw), "resnetrs50": lambda **kw: resnet_rs.ResNetRS(DEPTHS, **kw)}


@pytest.mark.parametrize("name", LONG)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", LONG)
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name, turned", [("senet154", "layer2.0.downsample.0.weight"), ("resnetrs50", "layer1.1.se.fc1.weight")])
def test_parity_with_timm(name, turned):
    """Odd maps too: ResNet-RS averages a last row or column of its own."""
    ours = randomize(SMALL[name](num_classes=10))
    theirs = timm.create_model(name, num_classes=10, layers=DEPTHS)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 52, 68)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


@pytest.mark.parametrize("name", SMALL)
def test_one_step_reaches_every_parameter(name):
    check_trains(SMALL[name](num_classes=5), 64)


def test_channels_and_dropout():
    x = images(2, 1, 32, 32)
    model = SMALL["senet154"](in_chans=1, num_classes=7)
    assert model.drop.p == 0.2
    model = SMALL["resnetrs50"](in_chans=1, num_classes=7, drop_rate=0.5, drop_path_rate=0.4)
    assert model(x).shape == (2, 7) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in model.modules() if isinstance(b, resnet_rs.Bottleneck)]
    assert rates == pytest.approx([0.4 * i / 4 for i in range(5)])
    out = resnet_rs.DropPath(0.25).train()(torch.ones(4000, 2, 2, 2))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))  # one value an image
    assert abs((out == 0).double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_shape_of_senet154():
    """64 groups, the first 1x1 of half the width of the 3x3, SE at a sixteenth, shortcuts of 3x3 between the stages."""
    model = build_meta("senet154")
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            assert block.conv2.groups == 64 and block.conv2.out_channels == 2 * block.conv1.out_channels
            assert block.se.fc1.out_channels * 16 == block.conv3.out_channels
    assert [stage[0].downsample[0].kernel_size[0] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 3, 3, 3]
    depth = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n and ".se." not in n]
    assert len(depth) == 154


def test_lecture_row_of_parameter_efficiency():
    """164 M parameters for ResNet-RS."""
    assert round(COUNTS["resnetrs350"][0] / 1e6) == 164
