"""Which of three kernels computes the gradients of a linear layer that runs as a convolution, and that each is right."""

from __future__ import annotations

import itertools

import pytest
import torch
from patch_helpers import assert_agree, step
from patch_small import images, pair
from test_patch_linear import Calls, at_any_size, weight_gradients_by  # noqa: F401  the fixture applies here too
from torch.utils.flop_counter import FlopCounterMode

from fastconv.ops import _linear

WEIGHT_GRADIENTS = ("kernel", "product", "convolution")
weight_gradient_by = _linear._weight_gradient_by


@pytest.mark.parametrize("needs", itertools.product((True, False), repeat=3), ids=str)
@pytest.mark.parametrize("by", WEIGHT_GRADIENTS)
def test_gradients_by_any_kernel(monkeypatch, by, needs):
    weight_gradients_by(monkeypatch, by)
    g = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(s, generator=g) for s in ((64, 9), (8, 9), (64, 8)))
    with Calls() as calls:
        actual = _linear.gradients(dy, x, weight, *needs)
    assert (torch.ops.fastconv.linear_wgrad in calls.seen) is (by == "kernel" and needs[1])
    assert (torch.ops.aten.mm in calls.seen) is (by == "product" and needs[1])
    assert (torch.ops.aten.convolution_backward in calls.seen) is (needs[0] or (by == "convolution" and needs[1]))
    for result, needed, expected in zip(actual, needs, (dy @ weight, dy.t() @ x, dy.sum(0)), strict=True):
        assert (result is not None) is needed
        if needed:
            assert result.is_contiguous()
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("by", WEIGHT_GRADIENTS)
def test_first_and_second_derivatives(monkeypatch, by):
    weight_gradients_by(monkeypatch, by)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (4, 3), (4,))]
    assert torch.autograd.gradcheck(_linear.as_convolution, leaves)
    assert torch.autograd.gradgradcheck(_linear.as_convolution, leaves)


def test_a_step_with_the_weight_kernel(monkeypatch):
    weight_gradients_by(monkeypatch, "kernel")
    model, plain = pair()
    with Calls() as calls:
        actual = step(model, images())
    assert sum(op is torch.ops.fastconv.linear_wgrad for op in calls.seen) == 4, "two blocks of two layers"
    assert_agree(actual, step(plain, images()))


@pytest.mark.parametrize(
    "rows, outputs, inputs, by",
    [
        (25_088, 384, 96, "kernel"),
        (1024, 128, 128, "kernel"),
        (1023, 128, 128, "product"),  # too few products, over few rows
        (2048, 100, 100, "convolution"),  # a small weight
        (2048, 101, 100, "product"),  # more outputs than inputs
    ],
)
def test_what_computes_weight_gradients(monkeypatch, rows, outputs, inputs, by):
    monkeypatch.setattr(_linear, "UP_TO_ZEN4", True)
    monkeypatch.setattr(_linear, "WEIGHT_KERNEL", True)
    assert weight_gradient_by(rows, outputs, inputs) == by
    monkeypatch.setattr(_linear, "_threads", lambda: 64)
    assert weight_gradient_by(rows, outputs, inputs) != "kernel", "shares of few elements"
    monkeypatch.setattr(_linear, "WEIGHT_KERNEL", False)
    assert weight_gradient_by(rows, outputs, inputs) != "kernel"
    monkeypatch.setattr(_linear, "UP_TO_ZEN4", False)
    assert weight_gradient_by(rows, outputs, inputs) == "convolution"


def test_products_are_counted():
    with FlopCounterMode(display=False) as counter:
        torch.ops.fastconv.linear_wgrad(torch.ones(5, 4), torch.ones(5, 3), True)
    assert counter.get_total_flops() == 2 * 5 * 4 * 3
