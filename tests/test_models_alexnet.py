"""AlexNet: the lecture's layers, and torchvision's tower."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from convnet_helpers import check_learns, check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from torch import nn

from fastconv.models import alexnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image at the published resolution
COUNTS = {"alexnet_two_groups": (60_965_224, 724_406_816), "alexnet": (61_100_840, 714_188_480)}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


def test_one_tower_is_torchvisions():
    with torch.device("meta"):
        assert shapes(build_meta("alexnet").state_dict()) == shapes(torchvision.models.alexnet().state_dict())
    ours = randomize(alexnet.alexnet(num_classes=10))
    theirs = torchvision.models.alexnet(num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 96, 72)
    check_same_logits(ours, theirs, x)
    with torch.no_grad():
        ours.features[3].weight.copy_(ours.features[3].weight.flip(-1))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


# (layer, sides, channels) of the lecture's list, images of 227x227x3
LECTURE = [
    ("conv1", 55, 96),
    ("pool", 27, 96),
    ("norm", 27, 96),
    ("conv2", 27, 256),
    ("pool", 13, 256),
    ("norm", 13, 256),
    ("conv3", 13, 384),
    ("conv4", 13, 384),
    ("conv5", 13, 256),
    ("pool", 6, 256),
]


def test_lecture_layer_sizes():
    model, seen = build_meta("alexnet_two_groups").eval(), []
    for name, module in model.named_children():
        if name.startswith(("conv", "pool", "norm", "fc")):
            module.register_forward_hook(lambda _m, _a, out, name=name: seen.append((name, *out.shape[1:])))
    model(torch.empty(1, 3, 227, 227, device="meta"))
    maps = [(name, side, side, chans) for name, side, chans in LECTURE]
    assert [(name, *size[1:], size[0]) if len(size) == 3 else (name, *size) for name, *size in seen] == [
        *maps,
        ("fc6", 4096),
        ("fc7", 4096),
        ("fc8", 1000),
    ]


def test_lecture_first_layer():
    """(227 - 11) / 4 + 1 = 55, and 11 * 11 * 3 * 96 = 35 K weights; pooling has none."""
    model = build_meta("alexnet_two_groups")
    conv = model.conv1
    assert (227 - conv.kernel_size[0]) // conv.stride[0] + 1 == 55 and (227 - conv.kernel_size[0]) % conv.stride[0] == 0
    assert (224 - conv.kernel_size[0]) % conv.stride[0] != 0  # the paper's 224 do not fit
    assert round(conv.weight.numel() / 1000) == 35
    assert not list(model.pool.parameters()) and not list(model.norm.parameters())


def test_lecture_groups_halve_the_weights():
    """Convolutions 2, 4 and 5 see the maps of their own GPU, N * (C / G) * K * K weights; the third and the linear layers see all."""
    model = build_meta("alexnet_two_groups")
    for name, groups in (("conv1", 1), ("conv2", 2), ("conv3", 1), ("conv4", 2), ("conv5", 2)):
        conv = getattr(model, name)
        assert conv.groups == groups
        assert conv.weight.numel() == conv.out_channels * (conv.in_channels // groups) * conv.kernel_size[0] ** 2


def test_two_groups_are_two_towers():
    """The whole network again as two GPUs would run it, each with its half of the channels, and the paper's normalisation."""
    model = randomize(alexnet.alexnet_two_groups(num_classes=10)).double().eval()
    x = images(2, 3, 107, 123).double()

    def halves(name, inputs, padding, stride=1):
        """A layer whose output channels are split over the GPUs; `inputs` are what each GPU sees."""
        conv = getattr(model, name)
        weights, biases = conv.weight.chunk(2), conv.bias.chunk(2)
        return [F.conv2d(i, w, b, stride, padding).relu() for i, w, b in zip(inputs, weights, biases)]

    def pool_and_norm(maps):
        """b_i = a_i / (k + alpha * sum_{j = i-2}^{i+2} a_j^2)^beta; channels on both sides of the split are neighbours."""
        a = F.max_pool2d(torch.cat(maps, 1), 3, 2)
        chans = a.shape[1]
        sums = torch.stack([a[:, max(i - 2, 0) : min(i + 3, chans)].square().sum(1) for i in range(chans)], 1)
        return (a / (2 + 1e-4 * sums) ** 0.75).chunk(2, 1)

    with torch.inference_mode():
        maps = pool_and_norm(halves("conv1", [x, x], 0, stride=4))
        both = torch.cat(pool_and_norm(halves("conv2", maps, 2)), 1)
        maps = halves("conv5", halves("conv4", halves("conv3", [both, both], 1), 1), 1)
        features = F.max_pool2d(torch.cat(maps, 1), 3, 2)
        torch.testing.assert_close(model.forward_features(x), features)
        y = F.adaptive_avg_pool2d(features, 6).flatten(1)
        y = model.fc8(model.fc7(model.fc6(y).relu()).relu())
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("name", COUNTS)
def test_one_step_reaches_every_parameter(name):
    check_trains(getattr(alexnet, name)(num_classes=5), 67)


def test_initialisation_and_dropout():
    torch.manual_seed(0)
    model = alexnet.alexnet_two_groups(in_chans=1, num_classes=7)
    x = images(2, 1, 67, 67)
    assert model(x).shape == (2, 7) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    layers = {n: m for n, m in model.named_children() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert all(abs(m.weight.std().item() - 0.01) < 1e-3 for m in layers.values())
    ones = {n for n, m in layers.items() if torch.equal(m.bias, torch.ones_like(m.bias))}
    assert ones == {"conv2", "conv4", "conv5", "fc6", "fc7"}
    assert not any(layers[n].bias.any() for n in layers.keys() - ones)


@pytest.mark.slow
def test_two_groups_learn_digits():
    """From weights of unit gain: the paper's initial ones need far more than these 50 steps to get anywhere."""
    torch.manual_seed(0)
    check_learns(randomize(alexnet.alexnet_two_groups(num_classes=10, drop_rate=0.0)), 67, steps=50, lr=1e-4)
