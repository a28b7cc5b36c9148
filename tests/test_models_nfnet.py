"""NFNet and adaptive gradient clipping."""

import copy

import pytest
import timm
import torch
from convnet_helpers import check_published, check_trains, images, randomize
from model_helpers import build_meta, check_same_logits, shapes
from timm.utils.agc import adaptive_clip_grad as timm_adaptive_clip_grad
from torch.utils.flop_counter import FlopCounterMode

from fastconv.models import nfnet
from fastconv.models.nfnet import adaptive_clip_grad

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image at the published resolution
COUNTS = {
    "nfnet_f0": (71_489_272, 12_384_198_656),
    "nfnet_f1": (132_634_232, 17_437_921_280),
    "nfnet_f2": (193_779_192, 33_139_318_784),
    "nfnet_f3": (254_924_152, 67_944_292_352),
    "nfnet_f4": (316_069_112, 121_122_250_752),
    "nfnet_f5": (377_214_072, 169_498_382_336),
    "nfnet_f6": (438_359_032, 228_292_861_952),
}
LONG = [pytest.param(n, marks=pytest.mark.slow) if n in ("nfnet_f4", "nfnet_f5") else n for n in COUNTS]
SMALL = {"depths": (2, 1, 1, 2), "widths": (32, 48, 64, 64), "stem": 16, "group_width": 8}


@pytest.mark.parametrize("name", LONG)
def test_parameters_and_gmacs(name):
    check_published(name, *COUNTS[name])


def test_published_arithmetic_at_test_size():
    """The paper's 35.54 G of F1 are of 320x320 images."""
    model = build_meta("nfnet_f1").eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, 320, 320))
    assert round(counter.get_total_flops() / 2e9, 2) == 35.54


@pytest.mark.parametrize("name", LONG)
def test_keys_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("turned", ["stages.0.1.conv2b.weight", "stages.3.0.attn_last.fc2.weight", "stages.1.0.downsample.conv.gain"])
def test_parity_with_timm(turned):
    """Odd maps too: the shortcuts average a last row or column of its own."""
    ours = randomize(nfnet.NormFreeNet(**SMALL, num_classes=10))
    config = {"channels": SMALL["widths"], "num_features": 2 * SMALL["widths"][-1], "stem_chs": 16, "group_size": 8}
    theirs = timm.create_model("nfnet_f0", num_classes=10, depths=SMALL["depths"], **config)
    theirs.load_state_dict(ours.state_dict())
    x = images(2, 3, 52, 68)
    check_same_logits(ours, theirs, x)
    weight = ours.get_parameter(turned)
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    with pytest.raises(AssertionError):
        check_same_logits(ours, theirs, x)


def test_convolutions_standardise_their_weights():
    """Shifting and scaling a channel's weights changes nothing; the activation's gain makes up for GELU."""
    conv = nfnet.ScaledStdConv2d(64, 32, 3).double()
    x = torch.nn.functional.gelu(images(8, 64, 16, 16).double())
    expected = conv(x)
    per_channel = (expected - conv.bias[:, None, None]).flatten(2)
    assert per_channel.std().item() == pytest.approx(1.0, rel=0.1)  # unit variance stays, away from the borders
    with torch.no_grad():
        conv.eps = 0.0
        expected = conv(x)
        conv.weight.mul_(torch.rand(32, 1, 1, 1) + 0.5).add_(torch.randn(32, 1, 1, 1))
    torch.testing.assert_close(conv(x), expected)


def test_signal_keeps_its_scale_without_normalisation():
    """Blocks start as their shortcuts; with gains of one the features of a deep network stay near unit scale."""
    torch.manual_seed(0)
    model = nfnet.NormFreeNet((2, 2, 6, 2), (32, 48, 64, 64), 16, 8, num_classes=5).eval()
    x = images(4, 3, 64, 64)
    block = model.stages[0][1]
    y = images(2, 32, 8, 8)
    assert torch.equal(block(y), y)  # conv3's gain is zero
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, nfnet.NormFreeBlock):
                block.conv3.gain.fill_(1.0)
    assert 0.3 < model.stages(model.stem(x)).std() < 3


def test_one_step_reaches_every_parameter():
    check_trains(nfnet.NormFreeNet(**SMALL, num_classes=5), 64)


def test_channels_classes_and_stochastic_depth():
    x = images(2, 1, 64, 64)
    model = nfnet.NormFreeNet(**SMALL, in_chans=1, num_classes=7, drop_rate=0.5, drop_path_rate=0.5)
    assert model(x).shape == (2, 7) and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    betas = [block.beta for stage in model.stages for block in stage]
    assert betas == pytest.approx([1, 1.04**-0.5, 1.08**-0.5, 1.04**-0.5, 1.04**-0.5, 1.04**-0.5])
    out = nfnet.DropPath(0.25).train()(torch.ones(4000, 2, 2, 2))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))  # one value an image


def parameters_with_gradients():
    """Convolution, linear layer, vectors, a scalar; zero weights, zero gradients, ratios on both sides of the limit."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in ((6, 3, 3, 3), (5, 7), (9,), (4, 1, 1, 1), ()):
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator) * 0.02
        parameters.append(parameter)
    with torch.no_grad():
        parameters[0].grad[0] *= 100
        parameters[0][1] = 0.0
        parameters[1].grad[2] = 0.0
    parameters.append(torch.nn.Parameter(torch.ones(3)))  # no gradient
    return parameters


@pytest.mark.parametrize("clip_factor, eps", [(0.01, 1e-3), (0.1, 0.5)])
def test_adaptive_clipping_is_timms(clip_factor, eps):
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    before = [copy.deepcopy(p.grad) for p in ours]
    adaptive_clip_grad(ours, clip_factor, eps)
    timm_adaptive_clip_grad(theirs, clip_factor, eps)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)
    changed = [not torch.equal(p.grad, g) for p, g in zip(ours, before) if g is not None]
    assert any(changed) and ours[-1].grad is None


def test_adaptive_clipping_is_its_formula():
    """Unit by unit: a row whose ratio exceeds lambda ends at it, the others keep their bits."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[6.0, 8.0], [0.01, 0.02], [1.0, 0.0]])
    adaptive_clip_grad([weight], clip_factor=0.02, eps=1e-3)
    torch.testing.assert_close(weight.grad[0], torch.tensor([0.06, 0.08]))  # norm 0.02 * 5
    assert torch.equal(weight.grad[1], torch.tensor([0.01, 0.02]))
    torch.testing.assert_close(weight.grad[2], torch.tensor([2e-5, 0.0]))  # norm 0.02 * eps
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.tensor([float("nan"), 0.0])
    adaptive_clip_grad([bias])
    assert bias.grad[0].isnan() and bias.grad[1] == 0


def test_adaptive_clipping_bounds_a_step():
    """After it no unit of the network moves by more than the learning rate times lambda of its own norm."""
    torch.manual_seed(0)
    model = randomize(nfnet.NormFreeNet(**SMALL, num_classes=5)).train()
    (100 * model(images(2, 3, 32, 32)).square().sum()).backward()
    ratio = 0.0
    for clip in (False, True):
        if clip:
            adaptive_clip_grad(model.parameters(), 0.05)
        ratios = [nfnet._unitwise_norm(p.grad) / nfnet._unitwise_norm(p.detach()).clamp(min=1e-3) for p in model.parameters()]
        ratio = max(r.max().item() for r in ratios)
        assert ratio <= 0.05 * (1 + 1e-5) if clip else ratio > 0.5
