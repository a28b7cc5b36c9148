"""DenseNet, ShuffleNet, SKNet and ResNeSt."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes

from fastconv.models import densenet, resnest, shufflenet, sknet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image
COUNTS = {
    "densenet121": (7_978_856, 2_834_161_664),
    "densenet161": (28_681_000, 7_727_907_072),
    "densenet169": (14_149_480, 3_359_843_328),
    "densenet201": (20_013_928, 4_291_365_888),
    "shufflenet_v1_x1_0": (1_864_728, 137_460_672),
    "shufflenet_v2_x0_5": (1_366_792, 40_476_448),
    "shufflenet_v2_x1_0": (2_278_604, 144_907_992),
    "shufflenet_v2_x1_5": (3_503_624, 295_759_392),
    "shufflenet_v2_x2_0": (7_393_996, 583_253_464),
    "skresnext50_32x4d": (27_479_784, 4_462_710_784),
    "resnest50d": (27_483_240, 5_371_160_576),
    "resnest101e": (48_275_016, 13_321_472_000),
    "resnest200e": (70_201_544, 35_519_694_848),
    "resnest269e": (110_929_480, 77_348_702_208),
}
IN_TORCHVISION = [name for name in COUNTS if name.startswith(("densenet", "shufflenet_v2"))]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", IN_TORCHVISION)
def test_keys_are_torchvisions(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("resnest")])
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize(
    "build, flipped",
    [
        (densenet.densenet121, "features.denseblock3.denselayer7.conv2.weight"),
        (shufflenet.shufflenet_v2_x0_5, "stage3.2.branch2.3.weight"),
        (sknet.skresnext50_32x4d, "layer3.2.conv2.paths.1.conv.weight"),
        (resnest.resnest50d, "layer3.2.conv2.conv.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parity(build, flipped):
    ours = randomize(build(num_classes=10))
    theirs = getattr(torchvision.models, build.__name__, None) or partial(timm.create_model, build.__name__)
    theirs = theirs(num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 64, 96)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(flipped)
    with torch.no_grad():
        weight.copy_(weight.flip(-1))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


def test_shuffle_mixes_the_groups():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert shufflenet.channel_shuffle(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_shufflenet_v1_block_is_its_formula():
    """Each of the second 1x1 convolution's groups takes every third channel; at stride 2 the pooled input leads."""
    for stride, in_chans in ((1, 24), (2, 12)):
        block = randomize(shufflenet.BlockV1(in_chans, 24, stride, groups=3, first=False)).double().eval()
        x = images(2, in_chans, 6, 8).double()
        with torch.no_grad():
            y = block.branch_main_1(x)
            assert y.shape[1] == 6
            conv, norm = block.branch_main_2
            parts = [torch.einsum("oi,nihw->nohw", w[:, :, 0, 0], y[:, g::3]) for g, w in enumerate(conv.weight.chunk(3))]
            y = norm(torch.cat(parts, dim=1))
            expected = torch.relu(x + y) if stride == 1 else torch.cat([torch.nn.AvgPool2d(3, 2, 1)(x), y.relu()], dim=1)
            torch.testing.assert_close(block(x), expected)
            assert expected.shape[1] == 24


def test_shufflenet_v1_keys():
    """Those of the official repository: 16 blocks, of which the stages' first have no parameters in their projection."""
    keys = set(build_meta("shufflenet_v1_x1_0").state_dict())
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

    def conv_norm(conv, norm_index):
        return {f"{conv}.weight"} | {f"{norm_index}.{key}" for key in norm}

    expected = conv_norm("first_conv.0", "first_conv.1") | {"classifier.0.weight"}
    for i in range(16):
        main = f"features.{i}.branch_main_"
        expected |= conv_norm(f"{main}1.0", f"{main}1.1") | conv_norm(f"{main}1.3", f"{main}1.4") | conv_norm(f"{main}2.0", f"{main}2.1")
    assert keys == expected


@pytest.mark.parametrize(
    "build",
    [densenet.densenet121, shufflenet.shufflenet_v1_x1_0, shufflenet.shufflenet_v2_x0_5, sknet.skresnext50_32x4d, resnest.resnest50d],
)
def test_trains(build):
    model = build(num_classes=10)
    check_trains(model, 32, dead={name for name, _ in model.named_parameters() if name.endswith("fc1.bias")})  # BatchNorm takes it out


def test_attention_weighs_the_branches():
    """Weights over the radix or the paths sum to 1: equal branches give themselves, whatever the attention says."""
    split = randomize(resnest.SplitAttn(8)).double().eval()
    select = randomize(sknet.SelectiveKernel(64, 1, groups=4)).double().eval()
    with torch.no_grad():
        split.conv.weight.copy_(split.conv.weight[:8].repeat(2, 1, 1, 1))
        for tensor in (split.bn0.weight, split.bn0.bias, split.bn0.running_mean, split.bn0.running_var):
            tensor.copy_(tensor[:8].repeat(2))
        x = torch.cat([images(2, 4, 6, 5).double()] * 2, dim=1)  # each group's half
        torch.testing.assert_close(split(x), split.act0(split.bn0(split.conv(x)))[:, :8])
        x = images(2, 64, 6, 5).double()
        weights = select.attn(torch.stack([path(x) for path in select.paths], dim=1))
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert weights.std() > 0.01 and weights.shape == (2, 2, 64, 1, 1)
