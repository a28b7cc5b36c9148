"""linear_wgrad, the gradients of a linear layer's weight and bias in one CPU kernel."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastconv.testing import assert_matches

# Around the sizes of panels, vectors and runs of rows at every SIMD level, and more than one block of dweight.
ROWS, OUTPUTS, INPUTS = (1, 3, 127, 128, 129, 300), (1, 7, 8, 9, 33, 200), (1, 15, 16, 17, 48, 50, 400)


def wgrad(dy, x, need_dbias=True):
    return torch.ops.fastconv.linear_wgrad(dy, x, need_dbias)


def random(rows, outputs, inputs, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, outputs, generator=g).to(dtype), torch.randn(rows, inputs, generator=g).to(dtype)


def check_integers(dtype=torch.float32):
    """Small integers leave nothing to a tolerance."""
    for rows, outputs, inputs in itertools.product(ROWS, OUTPUTS, INPUTS):
        dy, x = ((4 * t).round() for t in random(rows, outputs, inputs, dtype))
        dweight, dbias = wgrad(dy, x)
        assert torch.equal(dweight, dy.t() @ x) and torch.equal(dbias, dy.sum(0)), (rows, outputs, inputs)
        alone, nothing = wgrad(dy, x, False)
        assert torch.equal(alone, dweight) and nothing.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_wgrad_integers_are_exact(dtype):
    check_integers(dtype)


def test_linear_wgrad_same_bits_on_any_number_of_threads(threads):
    for outputs, inputs in ((200, 400), (96, 96), (5, 700)):
        dy, x = random(1000, outputs, inputs)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(wgrad(dy, x))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


def test_linear_wgrad_long_sums():
    """As exact as torch's: one by one, the rounding of so many rows would be ten times that."""
    dy, x = random(25_088, 40, 24)
    dy += 1  # sums that grow
    truth = dy.double().t() @ x.double(), dy.double().sum(0)
    for name, actual, eager, exact in zip(("dweight", "dbias"), wgrad(dy, x), (dy.t() @ x, dy.sum(0)), truth):
        assert_matches(actual, eager, exact, grad=True, dtype=torch.float32, name=name)


def test_linear_wgrad_not_finite():
    """A NaN and an Inf reach what the formula says, and no other place."""
    dy, x = random(140, 11, 21)
    dy[130, 9], x[3, 20] = float("nan"), float("inf")
    dweight, dbias = wgrad(dy, x)
    expected = torch.zeros(11, 21, dtype=torch.bool)
    expected[9], expected[:, 20] = True, True
    assert torch.equal(~dweight.isfinite(), expected)
    assert torch.equal(dbias.isnan(), torch.arange(11) == 9)


@pytest.mark.parametrize("rows, outputs", [(0, 5), (4, 0), (0, 0)])
def test_linear_wgrad_of_nothing(rows, outputs):
    dweight, dbias = wgrad(torch.ones(rows, outputs), torch.ones(rows, 3))
    assert torch.equal(dweight, torch.zeros(outputs, 3)) and torch.equal(dbias, torch.zeros(outputs))


@pytest.mark.parametrize(
    "dy, x, text",
    [
        (torch.ones(4, 5), torch.ones(3, 2), r"dy must be \(3, 5\), got \(4, 5\)"),
        (torch.ones(4), torch.ones(4, 2), r"two axes, got \(4\) and \(4, 2\)"),
        (torch.ones(4, 5), torch.ones(2, 4).t(), "x must be contiguous"),
        (torch.ones(5, 4).t(), torch.ones(4, 2), "dy must be contiguous"),
        (torch.ones(4, 5), torch.ones(4, 2).double(), "dy must be float64 exactly where"),
        (torch.ones(4, 5).bfloat16(), torch.ones(4, 2), "dy must have the dtype of x"),
        (torch.ones(4, 5).half(), torch.ones(4, 2).half(), "x must be float32 or float64"),
        (torch.ones(4, 5), torch.ones(4, 0), "x must have channels"),
    ],
)
def test_linear_wgrad_refuses(dy, x, text):
    with pytest.raises(RuntimeError, match=f"linear_wgrad: .*{text}"):
        wgrad(dy, x)


@pytest.mark.parametrize("need_dbias", [True, False])
def test_linear_wgrad_opcheck(need_dbias):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastconv.linear_wgrad.default, (*random(6, 5, 4), need_dbias), test_utils=tests)
