"""RegNetX and RegNetY."""

import pytest
import timm
import torch
import torchvision
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes

from fastconv.models import MODELS, regnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "regnetx_002": (2_684_792, 199_039_872),
    "regnetx_004": (5_157_512, 397_677_568),
    "regnetx_006": (6_196_040, 600_890_112),
    "regnetx_008": (7_259_656, 799_699_712),
    "regnetx_016": (9_190_136, 1_602_849_792),
    "regnetx_032": (15_296_552, 3_176_621_952),
    "regnetx_040": (22_118_248, 3_964_498_816),
    "regnetx_064": (26_209_256, 6_460_291_264),
    "regnetx_080": (39_572_648, 7_995_132_416),
    "regnetx_120": (46_106_056, 12_086_678_016),
    "regnetx_160": (54_278_536, 15_940_755_456),
    "regnetx_320": (107_811_560, 31_735_929_792),
    "regnety_002": (3_162_996, 199_514_080),
    "regnety_004": (4_344_144, 401_842_848),
    "regnety_006": (6_055_160, 601_220_992),
    "regnety_008": (6_263_168, 797_176_832),
    "regnety_016": (11_202_430, 1_612_076_160),
    "regnety_032": (19_436_338, 3_176_482_752),
    "regnety_040": (20_646_656, 3_973_288_448),
    "regnety_064": (30_583_252, 6_355_204_992),
    "regnety_080": (39_180_068, 7_963_057_312),
    "regnety_120": (51_822_544, 12_092_376_576),
    "regnety_160": (83_590_140, 15_911_510_272),
    "regnety_320": (145_046_770, 32_279_552_832),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name, turned", [("regnetx_002", "s4.b3.conv2.conv.weight"), ("regnety_002", "s3.b1.se.fc1.weight")])
def test_parity_with_timm(name, turned):
    ours = randomize(getattr(regnet, name)(num_classes=10))
    theirs = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 48, 64)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


@pytest.mark.parametrize("name", ["regnetx_002", "regnety_002"])
def test_one_step_reaches_every_parameter(name):
    check_trains(getattr(regnet, name)(num_classes=5), 64)


def test_widths_follow_the_line():
    """Figure 11 of the paper: four stages, widths of multiples of the group width."""
    assert regnet.stages(24, 36.44, 2.49, 13, 8) == [(1, 24, 8), (1, 56, 8), (4, 152, 8), (7, 368, 8)]
    assert regnet.stages(320, 69.86, 2.0, 23, 168) == [(2, 336, 168), (7, 672, 168), (13, 1344, 168), (1, 2520, 168)]
    assert regnet.stages(80, 49.56, 2.88, 23, 120)[0] == (2, 80, 80)  # a group is no wider than its stage
    for name in ("regnetx_040", "regnety_320"):
        model = build_meta(name)
        for stage in (model.s1, model.s2, model.s3, model.s4):
            conv = stage.b1.conv2.conv
            assert conv.stride == (2, 2) and conv.in_channels == conv.out_channels
            assert conv.weight.shape[1] * conv.groups == conv.out_channels


TORCHVISION_SIZES = {"400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320"}


@pytest.mark.parametrize("kind", "xy")
def test_torchvision_agrees_where_it_rounds_alike(kind):
    """But for regnetx_004, regnety_008 and regnety_080, a stage of which torchvision rounds up where the paper rounds down."""
    for size, number in TORCHVISION_SIZES.items():
        name = f"regnet{kind}_{number}"
        published = torchvision.models.get_model_weights(f"regnet_{kind}_{size}").IMAGENET1K_V1.meta["num_params"]
        assert (published == COUNTS[name][0]) == (name not in ("regnetx_004", "regnety_008", "regnety_080")), name


def test_channels_and_initialisation():
    torch.manual_seed(0)
    model = regnet.regnety_002(in_chans=1, num_classes=7)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert abs(model.s4.b2.conv2.conv.weight.std().item() - (2 / (9 * 8)) ** 0.5) < 5e-3  # a group's fan out
    assert abs(model.head.fc.weight.std().item() - 0.01) < 1e-3
    assert not model.s4.b2.se.fc2.bias.any()


def test_lecture_row_beside_convnext():
    """RegNetY-16G: 224, 84 M, 16.0 G."""
    params, macs = COUNTS["regnety_160"]
    assert MODELS["regnety_160"].resolution == 224
    assert round(params / 1e6) == 84
    assert macs / 1e9 == pytest.approx(16.0, rel=0.01)
