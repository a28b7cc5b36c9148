"""The worked examples of the lecture, computed from the bundled models and from torch's own layers."""

import pytest
import torch
from model_helpers import build_meta
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastconv.models import googlenet

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(module):
    """Parameters without biases, as the lecture counts them."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def run(module, *shape):
    """(multiply-accumulates, shape of the output) of one image on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        output = module.eval().to("meta")(torch.empty(1, *shape))
    return counter.get_total_flops() // 2, tuple(output.shape[1:])


def test_three_3x3_see_as_far_as_one_7x7():
    """The same receptive field, 27 C^2 weights for 49 C^2, and three nonlinearities for one."""
    c = 8
    stack = nn.Sequential(*[nn.Conv2d(c, c, 3, bias=False) for _ in range(3)])
    single = nn.Conv2d(c, c, 7, bias=False)
    for module in (stack, single):
        x = torch.ones(1, c, 15, 15, requires_grad=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(1.0)
        module(x)[0, 0, 4, 4].backward()
        reached = x.grad[0, 0].nonzero()
        assert reached.min(0).values.tolist() == [4, 4] and reached.max(0).values.tolist() == [10, 10] and len(reached) == 7 * 7
    assert weights(stack) == 3 * 3**2 * c**2 == 27 * c**2
    assert weights(single) == 7**2 * c**2 == 49 * c**2


# The rows of the table for VGG-16: layer, side, channels, weights
VGG16_ROWS = [
    ("input", 224, 3, 0),
    ("conv", 224, 64, 1_728),
    ("conv", 224, 64, 36_864),
    ("pool", 112, 64, 0),
    ("conv", 112, 128, 73_728),
    ("conv", 112, 128, 147_456),
    ("pool", 56, 128, 0),
    ("conv", 56, 256, 294_912),
    ("conv", 56, 256, 589_824),
    ("conv", 56, 256, 589_824),
    ("pool", 28, 256, 0),
    ("conv", 28, 512, 1_179_648),
    ("conv", 28, 512, 2_359_296),
    ("conv", 28, 512, 2_359_296),
    ("pool", 14, 512, 0),
    ("conv", 14, 512, 2_359_296),
    ("conv", 14, 512, 2_359_296),
    ("conv", 14, 512, 2_359_296),
    ("pool", 7, 512, 0),
    ("fc", 1, 4096, 102_760_448),
    ("fc", 1, 4096, 16_777_216),
    ("fc", 1, 1000, 4_096_000),
]


def test_vgg16_memory_and_parameters():
    """Each row of the table, and its totals: 138 M parameters, most in the late linear layers, and the activations, most in the early
    convolutions.

    The table states a total of 24 M activations. Its rows sum to 15.2 M, and to 28.8 M with each ReLU's result beside its layer's.
    """
    model, rows, relu = build_meta("vgg16").eval(), [("input", 224, 3, 0)], []
    kinds = {nn.Conv2d: "conv", nn.MaxPool2d: "pool", nn.Linear: "fc", nn.ReLU: "relu"}

    def record(module, args, output):
        kind = kinds[type(module)]
        if kind == "relu":
            relu.append(output.numel())
        else:
            rows.append((kind, 1 if output.dim() == 2 else output.shape[2], output.shape[1], weights(module)))

    for module in model.modules():
        if type(module) in kinds:
            module.register_forward_hook(record)
    run(model, 3, 224, 224)
    assert rows == VGG16_ROWS
    memory = [side * side * chans for _, side, chans, _ in rows]
    params = [count for *_, count in rows]
    assert round(sum(params) / 1e6) == 138
    assert round(memory[0] / 1e3, -1) == 150 and round(memory[1] / 1e6, 1) == 3.2
    assert sum(memory) == 15_237_608 and sum(memory) + sum(relu) == 28_793_320
    assert sum(memory) < 24e6 < sum(memory) + sum(relu)
    assert max(memory) == memory[1] == memory[2] and sum(memory[:7]) > 0.7 * sum(memory)  # most memory in the early convolutions
    assert max(params) == params[-3] and sum(params[-3:]) > 0.89 * sum(params)  # most parameters in the late linear layers


def test_inception_module_with_and_without_bottlenecks():
    """28x28x256 in: 854 M operations to 672 channels, and with 1x1 bottlenecks of 64 channels to 480 channels.

    The lecture's terms of the latter sum to 271 M; its total of 358 M has the 3x3 convolution twice.
    """
    total, chans = 0, 256  # the pooling keeps its depth
    for k, c in ((1, 128), (3, 192), (5, 96)):
        macs, shape = run(nn.Conv2d(256, c, k, padding=k // 2, bias=False), 256, 28, 28)
        assert shape == (c, 28, 28)
        total, chans = total + macs, chans + c
    assert round(total / 1e6) == 854
    assert chans == 672

    module = googlenet.Inception(256, 128, 64, 192, 64, 96, 64, large_kernel=5)
    terms = {}
    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d):
            terms[name] = run(conv, conv.in_channels, 28, 28)[0]
    assert terms == {
        "branch1.conv": 28 * 28 * 128 * 1 * 1 * 256,
        "branch2.0.conv": 28 * 28 * 64 * 1 * 1 * 256,
        "branch2.1.conv": 28 * 28 * 192 * 3 * 3 * 64,
        "branch3.0.conv": 28 * 28 * 64 * 1 * 1 * 256,
        "branch3.1.conv": 28 * 28 * 96 * 5 * 5 * 64,
        "branch4.1.conv": 28 * 28 * 64 * 1 * 1 * 256,
    }
    macs, shape = run(module, 256, 28, 28)
    assert shape == (128 + 192 + 96 + 64, 28, 28)
    assert macs == sum(terms.values()) and round(macs / 1e6) == 271
    assert round((macs + terms["branch2.1.conv"]) / 1e6) == 358


def test_googlenet_is_deep_and_small():
    """22 layers with weights, and no linear one but the head.

    The lecture has 5 million parameters, 12 times less than AlexNet. Of the paper's modules 7.0 M are counted, 9 times less.
    """
    model = build_meta("googlenet", aux_logits=False, large_kernel=5)
    stem = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name.startswith("conv")]
    modules = [m for m in model.modules() if isinstance(m, googlenet.Inception)]
    depths = {max(sum(isinstance(m, nn.Conv2d) for m in branch.modules()) for branch in module.children()) for module in modules}
    assert depths == {2} and len(stem) + 2 * len(modules) + 1 == 22
    assert [name for name, m in model.named_modules() if isinstance(m, nn.Linear)] == ["fc"]
    params, alexnet = (sum(p.numel() for p in m.parameters()) for m in (model, build_meta("alexnet_two_groups")))
    assert (round(params / 1e6, 1), round(alexnet / params)) == (7.0, 9)


@pytest.mark.parametrize("c1, c2, k, side", [(64, 128, 3, 14), (32, 96, 5, 9)])
def test_depthwise_separable_costs_1_c2_plus_1_k2(c1, c2, k, side):
    """of the standard convolution, in operations and in weights."""
    standard = nn.Conv2d(c1, c2, k, padding=k // 2, bias=False)
    separable = nn.Sequential(nn.Conv2d(c1, c1, k, padding=k // 2, groups=c1, bias=False), nn.Conv2d(c1, c2, 1, bias=False))
    ratio = 1 / c2 + 1 / k**2
    (macs, shape), (separable_macs, separable_shape) = (run(module, c1, side, side) for module in (standard, separable))
    assert shape == separable_shape
    assert separable_macs / macs == pytest.approx(ratio, rel=1e-12)
    assert weights(separable) / weights(standard) == pytest.approx(ratio, rel=1e-12)
