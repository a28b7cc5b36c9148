"""GoogLeNet, Inception v3 and v4, Inception-ResNet v2 and NASNet-A."""

import pytest
import timm
import torch
import torchvision
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from timm.models.nasnet import NASNetALarge

from fastconv.models import googlenet, inception, inception_resnet, inception_v4, nasnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image
COUNTS = {
    "googlenet": (13_004_888, 1_498_376_192),
    "inception_v3": (23_834_568, 5_713_216_096),
    "inception_v4": (42_679_816, 12_253_974_624),
    "inception_resnet_v2": (55_843_464, 13_155_794_016),
    "nasnet_a_mobile": (5_289_978, 563_638_816),
    "nasnetalarge": (88_753_150, 23_783_414_658),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


def test_parameters_of_the_variants():
    check_published("googlenet", 6_624_904, COUNTS["googlenet"][1], aux_logits=False)
    check_published("googlenet", 7_005_832, 1_582_671_872, aux_logits=False, large_kernel=5)
    check_published("inception_v3", 27_161_264, COUNTS["inception_v3"][1], aux_logits=True)


def parity(ours, theirs, x, flipped):
    """Equal logits with equal weights, and not with one convolution's taps flipped."""
    randomize(ours)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(flipped)
    with torch.no_grad():
        weight.copy_(weight.flip(-1, -2))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)
    with torch.no_grad():
        weight.copy_(weight.flip(-1, -2))


def test_googlenet_parity():
    ours = googlenet.googlenet(num_classes=10, drop_rate=0.0, aux_drop_rate=0.0)
    theirs = torchvision.models.googlenet(num_classes=10, init_weights=False, dropout=0.0, dropout_aux=0.0)
    x = images(4, 3, 64, 80)
    parity(ours, theirs, x, "inception4c.branch3.1.conv.weight")
    with torch.no_grad():
        for got, expected in zip(ours.train()(x), theirs.train()(x), strict=True):  # the heads in the same order
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_inception_v3_parity():
    ours = inception.inception_v3(num_classes=10, aux_logits=True, drop_rate=0.0)
    theirs = torchvision.models.inception_v3(num_classes=10, init_weights=False, dropout=0.0)
    x = images(2, 3, 83, 107)
    parity(ours, theirs, x, "Mixed_6c.branch7x7dbl_4.conv.weight")
    middle = images(2, 768, 17, 19)
    check_same_logits(ours.AuxLogits, theirs.AuxLogits, middle)


def test_googlenet_trains():
    check_trains(googlenet.googlenet(num_classes=10), 64)
    check_trains(googlenet.googlenet(num_classes=10, aux_logits=False, large_kernel=5), 64)


def test_inception_v3_trains():
    check_trains(inception.inception_v3(num_classes=10), 107)
    check_trains(inception.InceptionAux(768, num_classes=10), 17)
    logits, aux = build_meta("inception_v3", aux_logits=True).train()(torch.empty(2, 3, 299, 299, device="meta"))
    assert logits.shape == aux.shape == (2, 1000)


@pytest.mark.parametrize(
    "build, flipped",
    [
        (inception_v4.inception_v4, "features.12.branch2.3.conv.weight"),
        (inception_resnet.inception_resnet_v2, "repeat_1.7.branch1.2.conv.weight"),
    ],
    ids=["v4", "resnet_v2"],
)
def test_parity_with_timm(build, flipped):
    parity(build(num_classes=10), timm.create_model(build.__name__, num_classes=10), images(1, 3, 83, 107), flipped)


@pytest.mark.parametrize("size", [(75, 90), (64, 83)])  # an odd row at the end or not, at every reduction
def test_nasnet_parity(size):
    ours, theirs = nasnet.NASNet(6, 8, 192, num_classes=10), NASNetALarge(num_classes=10, stem_size=8, num_features=192)
    parity(ours, theirs, images(2, 3, *size), "cell_7.comb_iter_1_left.separable_2.depthwise_conv2d.weight")


def test_nasnet_keys():
    with torch.device("meta"):
        assert shapes(build_meta("nasnetalarge").state_dict()) == shapes(timm.create_model("nasnetalarge").state_dict())
        six = shapes(NASNetALarge(stem_size=32, num_features=1056).state_dict())
    left_out = tuple(f"cell_{6 * stage + i}." for stage in range(3) for i in (4, 5))
    assert shapes(build_meta("nasnet_a_mobile").state_dict()) == {k: v for k, v in six.items() if not k.startswith(left_out)}


def test_later_families_train():
    check_trains(inception_v4.inception_v4(num_classes=10), 107, batch=2)
    check_trains(inception_resnet.inception_resnet_v2(num_classes=10), 107, batch=2)
    check_trains(nasnet.NASNet(2, 8, 192, num_classes=10), 64)
