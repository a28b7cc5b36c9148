"""gelu_linear on a CPU goes through long maps in pieces, with the linear layer before it too."""

from __future__ import annotations

import sys

import pytest
import torch
from test_patch_linear import Calls, at_any_size, weight_gradients_by  # noqa: F401  the fixture applies here too
from torch import nn

import fastconv
from fastconv.ops import _linear, _pieces
from fastconv.ops.gelu_linear import reference
from fastconv.testing import assert_matches

GELU_LINEAR = sys.modules["fastconv.ops.gelu_linear"]  # `fastconv.ops.gelu_linear` is its function


@pytest.mark.parametrize("frozen", [None, "x", "weight"])
@pytest.mark.parametrize("rows", [0, 1, 64, 200, 321])
def test_gelu_linear_in_pieces(monkeypatch, frozen, rows):
    monkeypatch.setattr(_pieces, "ELEMENTS", 640)
    monkeypatch.setattr(_pieces, "ROWS", 64)
    monkeypatch.setattr(_linear, "MIN_ROWS", 1)
    g = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (torch.randn(s, generator=g) for s in ((rows, 8), (4, 8), (4,), (rows, 4)))
    leaves = {"x": x, "weight": weight, "bias": bias}

    def run(function, dtype=torch.float32, **kwargs):
        tensors = {name: t.detach().to(dtype).requires_grad_(name != frozen) for name, t in leaves.items()}
        out = function(*tensors.values(), **kwargs)
        with torch.no_grad():
            assert torch.equal(function(*tensors.values(), **kwargs), out)
        wanted = [t for t in tensors.values() if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, dy.to(dtype))]

    with fastconv.use_backend("cpu"), Calls() as calls:
        actual = run(fastconv.ops.gelu_linear)
    assert sum(op is torch.ops.fastconv.gelu_linear_fwd for op in calls.seen) >= 2 * max(1, rows // 80)
    eager, truth = run(reference), run(reference, torch.float64)
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        assert_matches(a, e, t, grad=i > 0, dtype=torch.float32, name=f"result {i}")


@pytest.mark.parametrize("frozen", [(), ("x",), ("w1",), ("x", "w1", "b1"), ("b1", "w2"), ("b2",), ("x", "w1", "b1", "w2", "b2")])
@pytest.mark.parametrize("bias, kernel", [(True, True), (True, False), (False, True), (False, False)])
def test_whole_mlp_in_pieces(monkeypatch, frozen, bias, kernel):
    """The linear layer before joins: the same values, and each gradient that is wanted."""
    weight_gradients_by(monkeypatch, "kernel" if kernel else "convolution")
    monkeypatch.setattr(_pieces, "ELEMENTS", 640)
    monkeypatch.setattr(_pieces, "ROWS", 64)
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 67, 6), "w1": (8, 6), "b1": (8,), "w2": (4, 8), "b2": (4,)}
    tensors = {name: torch.randn(s, generator=g) for name, s in shapes.items() if bias or name not in ("b1", "b2")}
    dy = torch.randn(3, 67, 4, generator=g)

    def plain(x, w1, b1, w2, b2):
        return reference(nn.functional.linear(x, w1, b1), w2, b2)

    def joined(x, w1, b1, w2, b2):
        return GELU_LINEAR.linear_gelu_linear(x, w1, b1, w2, b2, "none", "cpu")

    def run(function, dtype=torch.float32):
        leaves = {n: t.to(dtype).requires_grad_(n not in frozen) for n, t in ((n, t.clone()) for n, t in tensors.items())}
        out = function(*(leaves.get(name) for name in shapes))
        with torch.no_grad():
            assert torch.equal(function(*(leaves.get(name) for name in shapes)), out)
        wanted = [t for t in leaves.values() if t.requires_grad]
        return [out.detach(), *(torch.autograd.grad(out, wanted, dy.to(dtype)) if wanted else ())]

    results = zip(run(joined), run(plain), run(plain, torch.float64), strict=True)
    for i, (actual, eager, truth) in enumerate(results):
        assert_matches(actual, eager, truth, grad=i > 0, dtype=torch.float32, name=f"result {i}")


def test_pieces_are_all_rows_once():
    for rows, channels in ((0, 8), (1, 0), (5000, 384), (25_088, 384), (6_273, 768), (100_001, 16)):
        pieces = _pieces.pieces_of(rows, channels, torch.device("cpu"), torch.float32)
        assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
        assert all(piece.start % _pieces.BLOCK == 0 for piece in pieces)
        assert len(pieces) == 1 or min(p.stop - p.start for p in pieces) >= _pieces.ROWS - _pieces.BLOCK
        assert len(_pieces.pieces_of(rows, channels, torch.device("cpu"), torch.bfloat16)) == 1
