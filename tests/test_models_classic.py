"""LeNet-5, ZFNet, VGG, NiN and FractalNet."""

import pytest
import torch
import torchvision
from convnet_helpers import check_learns, check_published, check_trains, digits, images, randomize
from model_helpers import build_meta, check_same_logits, shapes

from fastconv.models import MODELS, fractalnet, lenet, nin, vgg, zfnet

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image
COUNTS = {
    "lenet5": (61_706, 416_520),
    "vgg16": (138_357_544, 15_470_264_320),
    "vgg19": (143_667_240, 19_632_062_464),
    "zfnet": (62_357_608, 1_168_032_896),
    "zfnet_wide": (107_627_624, 2_476_704_896),
    "nin_cifar": (966_986, 222_486_528),
    "nin_imagenet": (7_595_176, 1_100_188_800),
    "fractalnet20": (33_724_618, 845_222_912),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


def test_lenet5_differs_from_the_published_network_as_it_says():
    """60,000 parameters are published: subsampling's 44, C3's 1,516 and no output layer."""
    model = build_meta("lenet5")
    layer = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    assert layer["c1"] + layer["c5"] + layer["f6"] + 1_516 + 2 * (6 + 16) == 60_000
    assert layer["c3"] - 1_516 == 900 and layer["output"] == 850


def test_lenet5_learns():
    torch.manual_seed(0)
    check_trains(lenet.lenet5(), 32)
    check_learns(lenet.lenet5(), 32, steps=120)


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_has_torchvisions_keys(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


def narrow_head(model):
    """Without most of the linear layers' weights: 120 M that take seconds to fill and show nothing."""
    model.classifier[0] = torch.nn.Linear(512 * 7 * 7, 64)
    model.classifier[3] = torch.nn.Linear(64, 48)
    model.classifier[6] = torch.nn.Linear(48, 10)
    return model


def test_vgg_parity():
    with torch.device("meta"):
        ours, theirs = narrow_head(vgg.vgg16()), narrow_head(torchvision.models.vgg16())
    ours = randomize(ours.to_empty(device="cpu"))
    theirs.to_empty(device="cpu").load_state_dict(ours.state_dict())
    x = images(1, 3, 96, 64)
    check_same_logits(ours, theirs, x)
    with torch.inference_mode():
        ours.features[2].weight.copy_(ours.features[2].weight.flip(-1))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


def test_vgg_trains():
    with torch.device("meta"):
        model = narrow_head(vgg.vgg16())
    check_trains(model.to_empty(device="cpu"), 32)


def sides(name, layers):
    """Side of the maps after each of the layers at the model's resolution."""
    model, found = build_meta(name).eval(), []
    for module in model.features:
        if isinstance(module, layers):
            module.register_forward_hook(lambda module, args, output: found.append(output.shape[-1]))
    size = MODELS[name].resolution
    model(torch.empty(1, 3, size, size, device="meta"))
    return found


def test_sizes_of_the_maps():
    """As in figure 3 of ZFNet's paper; NiN's last maps are 8x8 and 6x6, the kernels of its authors' average pooling."""
    assert sides("zfnet", (torch.nn.Conv2d, torch.nn.MaxPool2d)) == [110, 55, 26, 13, 13, 13, 13, 6]
    assert sides("nin_cifar", nin.MlpConv) == [32, 16, 8]
    assert sides("nin_imagenet", nin.MlpConv) == [54, 27, 13, 6]


def small_zfnet():
    """Images of 64x64, whose last map is 1x1."""
    model = zfnet.ZFNet((48, 40, 32), in_chans=1, num_classes=10, hidden=64, drop_rate=0.0)
    model.classifier[1] = torch.nn.Linear(32, 64)
    return model


def test_zfnet_learns():
    torch.manual_seed(0)
    check_trains(small_zfnet(), 64)
    check_learns(small_zfnet(), 64, steps=60, batch=16)


def test_nin_learns():
    torch.manual_seed(0)
    check_trains(nin.nin_imagenet(num_classes=10, drop_rate=0.0), 64)
    check_trains(nin.nin_cifar(drop_rate=0.0), 16)
    check_learns(nin.nin_cifar(in_chans=1, drop_rate=0.0), 8, steps=150, lr=3e-4)


def small_fractal(**kw):
    return fractalnet.FractalNet((8, 12, 16), 3, in_chans=1, **kw)


def test_fractal_block_is_its_recursion():
    """f_1 = conv, f_{C+1}(z) = mean(f_C(f_C(z)), conv(z)), where the joins of one place are one mean of all that end there."""
    block = randomize(fractalnet.FractalBlock(3, 5, 3, 0.0, 0.0)).double().eval()
    (a,), (b, c), (d, e, f, g) = block.columns
    x = images(2, 3, 6, 7).double()
    with torch.no_grad():
        middle = (b(x) + e(d(x))) / 2
        torch.testing.assert_close(block(x), (a(x) + c(middle) + g(f(middle))) / 3)
        for column, convs in enumerate(((a,), (b, c), (d, e, f, g))):
            expected = x
            for conv in convs:
                expected = conv(expected)
            torch.testing.assert_close(block(x, column), expected)


def test_local_drop_path_leaves_an_input_at_least():
    torch.manual_seed(0)
    draws = [fractalnet.drop_local(3, 0.4) for _ in range(4000)]
    assert all(kept and kept == sorted(set(kept)) and set(kept) <= {0, 1, 2} for kept in draws)
    # an input stays with 0.6, or as the greatest of three that would all go
    for i in range(3):
        share = sum(i in kept for kept in draws) / len(draws)
        assert abs(share - (0.6 + 0.4**3 / 3)) < 4 * (0.25 / 4000) ** 0.5
    assert fractalnet.drop_local(2, 0.0) == [0, 1]


def test_drop_path_samples_paths_in_training_alone():
    """Globally one of the columns of the whole network; locally more than those; in eval all."""
    torch.manual_seed(0)
    x = images(4, 1, 8, 8)
    model = randomize(small_fractal(drop_path=0.5, global_ratio=1.0))
    with torch.no_grad():
        columns = [model.train()(x, column) for column in range(3)]
        drawn = [min(range(3), key=lambda c: torch.dist(columns[c], out)) for out in (model(x) for _ in range(40))]
        assert set(drawn) == {0, 1, 2}
        assert all(torch.dist(columns[c], model(x, c)) == 0 for c in range(3))
        full = model.eval()(x)
        assert torch.equal(model(x), full)
        model.global_ratio = 0.0
        model.train()
        sums = {round(model(x).sum().item(), 3) for _ in range(40)}
        assert len(sums) > 10 and len({round(out.sum().item(), 3) for out in columns}) == 3
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        small_fractal(drop_path=1.0)


def test_fractalnet_learns():
    """With drop-path, after which each column alone knows the digits too."""
    torch.manual_seed(0)
    check_trains(small_fractal(), 8, batch=8)
    model = fractalnet.FractalNet((16, 24, 32), 3, in_chans=1, drop_path=0.15)
    check_learns(model, 8, steps=300, lr=3e-3)
    x, labels = digits(8, 1)
    with torch.inference_mode():
        for column in range(3):
            right = (model.eval()(x, column).argmax(1) == labels).double().mean().item()
            assert right > 0.5, column
