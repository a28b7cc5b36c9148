"""Patched models under tracers and torch.compile."""

import copy
import warnings

import pytest
import timm
import torch
from patch_helpers import assert_agree, relative, step
from patch_small import images, make, pair
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastconv

pytestmark = pytest.mark.usefixtures("one_thread")


def test_exported_and_traced_graphs_are_plain():
    model, plain = pair()
    model.eval()
    x = images()
    expected = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        symbolic = torch.fx.symbolic_trace(model)
        exports = [torch.export.export(model, (x,), strict=strict) for strict in (False, True)]
    assert "fastconv" not in str(traced.inlined_graph)
    for graph in (symbolic.graph, *(e.graph for e in exports)):
        assert not any("fastconv" in str(n.target) for n in graph.nodes)
    for call in (traced, symbolic, *(e.module() for e in exports)):
        assert relative(call(x), expected) <= 1e-6


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def test_patch_after_compile(dynamo):
    kernels = []

    def capture(graph, _):
        kernels.append(sum("depthwise_conv_norm_fwd" in str(n.target) for n in graph.graph.nodes))
        return graph

    model, plain = make(), make()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    for change in (lambda _: None, fastconv.patch, fastconv.unpatch):
        change(model)
        with torch.no_grad():
            assert relative(compiled(images()), plain(images())) <= 1e-6
    assert kernels == [0, 2], "unpatched again, it takes up its first graph"


def test_regional_compile_makes_no_more_graphs_than_unpatched(dynamo):
    graphs = []
    for patched in (False, True):
        dynamo.reset()
        model = make(4)
        if patched:
            fastconv.patch(model)
        counter = dynamo.testing.CompileCounter()
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        for _ in range(3):
            model(images())
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0]


def test_hook_put_in_after_compile_runs(dynamo):
    model, plain = pair()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    for m in (model, plain):
        m[0].norm.register_forward_hook(lambda _m, _a, out: 3 * out)
    with dynamo.config.patch(skip_nnmodule_hook_guards=False):
        dynamo.reset()
        assert relative(compiled(images()), plain(images())) <= 1e-5


def test_fallbacks_and_copies_are_not_counted_in_compiled_code(dynamo):
    """A counter would recompile at every call, a warning would break the graph."""
    model, plain = pair()
    for m in (model, plain):
        m[0].norm.register_forward_hook(lambda _m, _a, out: 3 * out)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", RuntimeWarning)
        first = compiled(images())
        with dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                assert torch.equal(compiled(images()), first)
    assert relative(first, plain(images())) <= 1e-5
    sites = fastconv.report(model).sites
    assert not any(s.fallbacks or s.copies for s in sites)
    assert {s.backend for s in sites} == {"-"}


def test_compile_autocast(dynamo):
    model, plain = pair()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = step(model, images(), compiled), step(plain, images())
    for a, b in zip((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < 3e-2


def test_disabled_and_forced_backends_reach_a_compiled_model(dynamo):
    model, plain = pair()
    kernels = []

    def capture(graph, _):
        kernels.append(sum("depthwise_conv_norm_fwd" in str(n.target) for n in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    with torch.no_grad():
        expected = plain(images())
        assert relative(compiled(images()), expected) <= 1e-5
        with fastconv.disabled():
            assert relative(compiled(images()), expected) <= 1e-6
        with fastconv.use_backend("eager"):
            assert relative(compiled(images()), expected) <= 1e-6
    assert kernels == [2, 0, 0]


def test_inductor_and_dynamic_sizes(dynamo):
    model, plain = pair(drop_path=0.3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        torch.manual_seed(0)
        actual = step(model.eval(), images(batch), compiled)
        assert_agree(actual, step(plain.eval(), images(batch)))
    step(model.train(), images(4), compiled)


@pytest.mark.parametrize("part", ("gate", "grouped", "block"))
def test_inductor_keeps_maps_as_they_lie(dynamo, part):
    """Between convolutions Inductor takes what four axes backward is to find for (N, C, H, W), and stores it in channels_last: our
    (N, H, W, C) would come out transposed, and go back."""
    torch.manual_seed(0)
    middle = {
        "gate": timm.layers.SEModule(48, rd_channels=8),
        "grouped": nn.Conv2d(48, 48, 3, padding=1, groups=12, bias=False),
        "block": timm.models.convnext.ConvNeXtBlock(48),
    }[part]
    after = nn.Identity() if part == "block" else nn.BatchNorm2d(48)  # that norm would take the gradient of the block's last bias
    layers = nn.BatchNorm2d(48), nn.ReLU(), middle, after, nn.ReLU()
    plain = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), *layers, nn.Conv2d(48, 16, 1)).double().to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    assert fastconv.patch(model).fused
    x = torch.randn(2, 16, 12, 10, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert_agree(step(model, x, torch.compile(model)), step(plain, x))
    maps = [t for t in saved if t.numel() == 2 * 48 * 12 * 10]
    assert len(maps) >= 4
    for t in maps:
        nchw = t.shape == (2, 48, 12, 10)
        assert t.is_contiguous(memory_format=torch.channels_last if nchw else torch.contiguous_format), (t.shape, t.stride())
