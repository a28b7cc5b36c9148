"""Patched ConvNeXt blocks hand the shortcut's gradient to the convolution's backward: no sum of its own in a training step."""

import copy

import pytest
import torch
from patch_small import images, make

import fastconv
from fastconv import use_backend
from fastconv.testing import RawCalls

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = ("depthwise_conv_norm", "residual_scale")


def backward_calls(model, x):
    with use_backend("cpu"), RawCalls() as recorded:
        model(x).square().sum().backward()
    return [args for func, args, _ in recorded.calls if func.__name__.startswith("depthwise_conv_norm_bwd")]


def sums(model, x):
    """Sums of maps in the backward pass; autograd's own among them."""
    with use_backend("cpu"):
        out = model(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out.sum().backward()
    return sum(e.name in ("aten::add", "aten::add_") and len(e.input_shapes[0]) == 4 for e in profile.events())


def channels_last():
    return images().to(memory_format=torch.channels_last)


def test_no_sum_of_the_two_gradients():
    plain = make(blocks=3)
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops=OPS)
    assert [sums(net, channels_last().requires_grad_()) for net in (plain, model)] == [3, 0]
    assert all(args[7] is not None for args in backward_calls(model, channels_last().requires_grad_()))


@pytest.mark.parametrize("drop_path", (0.0, 0.5))
def test_values_and_gradients_are_those_of_the_sum(drop_path):
    model = make(blocks=3, drop_path=drop_path).train()
    other = copy.deepcopy(model)
    fastconv.patch(model, ops=OPS)
    fastconv.patch(other, ops=OPS)
    nchw, last = images().requires_grad_(), channels_last().requires_grad_()  # the first block copies the one, and adds apart
    with use_backend("cpu"):
        for net, x in ((model, nchw), (other, last)):
            torch.manual_seed(5)
            net(x).square().sum().backward()
    torch.testing.assert_close(nchw.grad, last.grad)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_where_x_needs_no_gradient_or_is_copied_first():
    model = make()
    fastconv.patch(model, ops=OPS)
    second, first = backward_calls(model, channels_last())
    assert second[7] is not None and first[7] is None
    second, first = backward_calls(model, images().requires_grad_())
    assert second[7] is not None and first[7] is None
