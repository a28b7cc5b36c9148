"""ResNet, Wide ResNet, ResNeXt and SE-ResNet."""

import pytest
import timm
import torch
import torchvision
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from torch import nn

from fastconv.models import resnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "wide_resnet50_2": (68_883_240, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 22_753_050_624),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "resnext101_32x4d": (44_177_704, 7_969_996_800),
    "resnext101_32x8d": (88_791_336, 16_414_015_488),
    "resnext101_64x4d": (83_455_272, 15_460_270_080),
    "seresnet50": (28_088_024, 4_091_699_200),
    "seresnet101": (49_326_872, 7_806_148_608),
    "seresnet152": (66_821_848, 11_520_204_800),
    "seresnext50_32x4d": (27_559_896, 4_232_994_816),
}


def peer(name, **kw):
    """torchvision's model, or timm's where it has none."""
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, **kw)
    return timm.create_model(name, **kw)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_are_the_peers(name):
    with torch.device("meta"):
        theirs = peer(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


DEPTHS = (2, 1, 1, 1)  # a block with and one without a projection
KINDS = {
    "resnet18": (resnet.BasicBlock, {}, "layer3.0.conv2.weight"),
    "resnet50": (resnet.Bottleneck, {}, "layer2.0.conv2.weight"),
    "wide_resnet50_2": (resnet.Bottleneck, {"width_per_group": 128}, "layer1.1.conv2.weight"),
    "resnext50_32x4d": (resnet.Bottleneck, {"groups": 32, "width_per_group": 4}, "layer3.0.conv2.weight"),
    "seresnext50_32x4d": (resnet.Bottleneck, {"groups": 32, "width_per_group": 4, "se": True}, "layer1.1.se.fc2.weight"),
}


def small(name, **kw):
    block, block_kw, _ = KINDS[name]
    return resnet.ResNet(block, DEPTHS, num_classes=10, **block_kw, **kw)


@pytest.mark.parametrize("name", KINDS)
def test_parity(name):
    ours = randomize(small(name))
    depths = {"layers": list(DEPTHS)}
    if name in torchvision.models.list_models():
        block, block_kw, _ = KINDS[name]
        theirs = torchvision.models.ResNet(getattr(torchvision.models.resnet, block.__name__), num_classes=10, **depths, **block_kw)
    else:
        theirs = timm.create_model(name, num_classes=10, **depths)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 64)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(KINDS[name][-1])
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


def test_the_stride_is_in_the_3x3_convolution():
    for name, module in build_meta("resnet50").named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            assert name == "conv1" or name.endswith(("0.conv2", "0.downsample.0")), name


@pytest.mark.parametrize("name", ["resnet18", "seresnext50_32x4d"])
def test_one_step_reaches_every_parameter(name):
    check_trains(small(name), 64, batch=2)


def test_channels_and_initialisation():
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, DEPTHS, se=True, in_chans=1, num_classes=7, zero_init_residual=True)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    weight = model.layer3[0].conv2.weight  # fan out 256 * 9
    assert abs(weight.std().item() - (2 / (256 * 9)) ** 0.5) < 1e-3
    x = torch.randn(2, 256, 8, 8)
    assert torch.equal(model.eval().layer1[1](x), x.relu())  # a zero branch
    basic = small("resnet18", zero_init_residual=True).eval().layer1[1]
    assert torch.equal(basic(x[:, :64]), x[:, :64].relu())


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_lecture_depths_count_the_layers_with_weights(depth):
    """Convolutions on the way through the blocks, and the head."""
    model = build_meta(f"resnet{depth}")
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(layers) == depth


def test_lecture_row_of_resnet50():
    """The table beside ConvNeXt-T and Swin-T: sides and channels of the stages, 4.1 GMACs, 25.6 M parameters."""
    model, seen = build_meta("resnet50"), []
    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(tuple(out.shape[1:])))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert seen == [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        blocks = model.get_submodule(f"layer{stage}")
        assert len(blocks) == depth
        for block in blocks:
            ends = [(c.kernel_size[0], c.out_channels) for c in (block.conv1, block.conv2, block.conv3)]
            assert ends == [(1, width), (3, width), (1, 4 * width)]
    params, macs = COUNTS["resnet50"]
    assert (round(params / 1e6, 1), round(macs / 1e9, 1)) == (25.6, 4.1)


def test_lecture_improvements():
    """Wide ResNet doubles the inner width, ResNeXt works in 32 groups at nearly equal cost, SE adds hardly any arithmetic."""
    plain, wide, grouped = (build_meta(n).layer2[1].conv2 for n in ("resnet50", "wide_resnet50_2", "resnext50_32x4d"))
    assert wide.out_channels == 2 * plain.out_channels and wide.groups == 1
    assert grouped.groups == 32 and grouped.weight.shape[1] * 32 == grouped.in_channels
    (params, macs), (grouped_params, grouped_macs), (se_params, se_macs) = (
        COUNTS[n] for n in ("resnet50", "resnext50_32x4d", "seresnet50")
    )
    assert abs(grouped_params / params - 1) < 0.05 and abs(grouped_macs / macs - 1) < 0.05
    assert 1.05 < se_params / params < 1.15 and 1 < se_macs / macs < 1.01
    assert COUNTS["wide_resnet50_2"][1] < COUNTS["resnet152"][1]
