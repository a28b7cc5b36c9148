"""Pre-activation ResNet, and Wide ResNet for CIFAR."""

from collections import OrderedDict

import pytest
import timm
import torch
from convnet_helpers import check_learns, check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from timm.layers import BatchNormAct2d, create_conv2d
from torch import nn

from fastconv.models import preact_resnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image at the published resolution
COUNTS = {
    "resnetv2_50": (25_549_352, 4_089_184_256),
    "resnetv2_101": (44_541_480, 7_801_405_440),
    "resnetv2_152": (60_185_128, 11_513_626_624),
    "preact_resnet164": (1_703_258, 244_500_992),
    "preact_resnet1001": (10_327_706, 1_487_849_984),
    "wide_resnet28_10": (36_479_194, 5_243_328_768),
}
DEPTHS = (2, 1, 1, 1)  # a block with and one without a projection


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "preact_resnet1001" else n for n in COUNTS])
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("resnetv2")])
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


def cifar_peer(ours, **kw):
    """timm's network with the stem and the strides of the networks for CIFAR."""
    theirs = timm.models.resnetv2.ResNetV2(num_classes=10, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, stem_chs=16, **kw)
    theirs.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 3, padding=1, bias=False)))
    strides = {name: module.stride for name, module in ours.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Conv2d):
            module.stride = strides[name]
    return theirs


BUILD = {
    "resnetv2_50": lambda **kw: preact_resnet.PreActResNet(preact_resnet.PreActBottleneck, DEPTHS, (256, 512, 1024, 2048), 64, **kw),
    "preact_resnet164": lambda **kw: preact_resnet._cifar(2, **kw),
    "wide_resnet28_10": lambda **kw: preact_resnet.PreActResNet(preact_resnet.PreActBasic, (2, 1, 1), (32, 48, 64), 16, cifar=True, **kw),
}


@pytest.mark.parametrize(
    "name, turned",
    [
        ("resnetv2_50", "stages.1.blocks.0.downsample.conv.weight"),
        ("preact_resnet164", "stages.2.blocks.1.conv2.weight"),
        ("wide_resnet28_10", "stages.0.blocks.1.conv1.weight"),
    ],
)
def test_parity_with_timm(name, turned):
    ours = randomize(BUILD[name](num_classes=10))
    if name == "resnetv2_50":
        theirs = timm.create_model(name, num_classes=10, layers=DEPTHS)
    elif name == "preact_resnet164":
        theirs = cifar_peer(ours, layers=(2, 2, 2), channels=(64, 128, 256))
    else:
        theirs = cifar_peer(ours, layers=(2, 1, 1), channels=(32, 48, 64), basic=True, bottle_ratio=1.0)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 64)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


@pytest.mark.parametrize("name", BUILD)
def test_one_step_reaches_every_parameter(name):
    check_trains(BUILD[name](num_classes=5), 64 if name == "resnetv2_50" else 16)


@pytest.mark.parametrize("name", ["preact_resnet164", "wide_resnet28_10"])
def test_learns_digits(name):
    torch.manual_seed(0)
    check_learns(BUILD[name](in_chans=1, num_classes=10), 8, steps=60, lr=3e-3)


def test_nothing_stands_on_the_path_of_the_sums():
    """Branches at zero leave the input of a stage's later blocks as it is, negative values too."""
    model = BUILD["preact_resnet164"]().eval()
    block = model.stages[0].blocks[1]
    x = images(2, 64, 8, 8)
    nn.init.zeros_(block.conv3.weight)
    assert torch.equal(block(x), x) and x.min() < 0
    assert block.downsample is None and model.stages[0].blocks[0].downsample is not None


def test_channels_classes_and_dropout():
    x = images(2, 1, 16, 16)
    model = BUILD["wide_resnet28_10"](in_chans=1, num_classes=7, drop_rate=0.5)
    assert model(x).shape == (2, 7) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    assert abs(model.stages[1].blocks[0].conv2.weight.std().item() - (2 / (48 * 9)) ** 0.5) < 2e-3


@pytest.mark.parametrize(
    "name, depth, uncounted", [("resnetv2_50", 50, "downsample"), ("preact_resnet164", 164, "downsample"), ("wide_resnet28_10", 28, "head")]
)
def test_depths_count_the_layers_with_weights(name, depth, uncounted):
    """Wide ResNet's count has the projections in and leaves the head out."""
    layers = [n for n, m in build_meta(name).named_modules() if isinstance(m, nn.Conv2d) and uncounted not in n]
    assert len(layers) == depth


def test_lecture_width_instead_of_depth():
    """Ten times the filters of the plain network's 16, 32, 64."""
    assert [stage.blocks[1].conv1.out_channels for stage in build_meta("wide_resnet28_10").stages] == [160, 320, 640]
