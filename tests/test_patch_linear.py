"""The linear layers of a block as 1x1 convolutions: the same layer to whoever looks, for every model that is patched."""

import copy
import itertools
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torchvision
from functorch.compile import make_boxed_func
from official_convnext import Network
from patch_contract import SingleProcessContract
from patch_helpers import assert_agree, randomise_, step
from patch_small import OPS, backends, images, make, pair
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.convnext import CNBlockConfig
from transformers import ConvNextV2Config, ConvNextV2Model

import fastconv
from fastconv.ops import _linear
from fastconv.testing import assert_matches

GELU_LINEAR = sys.modules["fastconv.ops.gelu_linear"]  # `fastconv.ops.gelu_linear` is its function


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch, one_thread):
    """As on a processor that prefers convolutions, and on more threads than the tests take; no tensor is too small."""
    monkeypatch.setattr(_linear, "PREFERS_CONVOLUTION", True)
    weight_gradients_by(monkeypatch, "convolution")
    monkeypatch.setattr(_linear, "_threads", lambda: 2)
    for bound in ("MIN_ROWS", "MIN_PRODUCTS"):
        monkeypatch.setattr(_linear, bound, 0)
    monkeypatch.setattr(_linear, "MIN_ELEMENTS", -1)


def weight_gradients_by(monkeypatch, kind: str) -> None:
    monkeypatch.setattr(_linear, "_weight_gradient_by", lambda *sizes: kind)


class Calls(TorchDispatchMode):
    """The operators that run, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def site_of(model):
    return next(s for s in fastconv.report(model).sites if s.op == "linear")


class TestTimm(SingleProcessContract):
    """The layers lie in an Mlp, whose call is replaced."""

    blocks = 4

    def make(self, drop_path=0.0):
        return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10, drop_path_rate=drop_path)


class TestTorchvision(SingleProcessContract):
    """The layers lie in the Sequential that holds the convolution too."""

    blocks = 2

    def make(self, drop_path=0.0):
        settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
        return torchvision.models.ConvNeXt(settings, stochastic_depth_prob=drop_path, num_classes=10)


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: Network(grn=True),
        lambda: ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
        lambda: timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), use_grn=True, ls_init_value=None),
    ],
    ids=["official", "hf", "timm grn"],
)
def test_every_family(make_model):
    torch.manual_seed(0)
    plain = randomise_(make_model())
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert report.blocks[0] == report.blocks[1] == sum(s.op == "linear" for s in report.native) > 0
    x = torch.randn(2, 3, 64, 48)
    assert_agree(step(model, x), step(plain, x))
    assert {s.backend for s in report.native if s.op == "linear"} == {"onednn"}


def test_no_matrix_product_is_left():
    model, plain = pair()
    products, aten = {}, torch.ops.aten
    for name, m in (("patched", model), ("plain", plain)):
        with Calls() as calls:
            step(m, images())
        products[name] = sum(op in (aten.addmm, aten.mm, aten.bmm) for op in calls.seen)
    assert products == {"patched": 0, "plain": 2 * 2 * 3}  # two blocks of two layers: output and two gradients


def test_wide_and_narrow_over_many_rows():
    """The bias gradient is a long sum: oneDNN's own is ten times less accurate than eager's, and is not used."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (torch.randn(s, generator=g) for s in ((8, 56, 56, 24), (48, 24), (48,), (8, 56, 56, 48)))

    def run(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    truth = run(nn.functional.linear, *(t.double() for t in (x, weight, bias, dy)))
    eager, actual = (run(f, x, weight, bias, dy) for f in (nn.functional.linear, _linear.as_convolution))
    for name, a, e, t in zip(("out", "dx", "dweight", "dbias"), actual, eager, truth, strict=True):
        assert_matches(a, e, t, grad=name != "out", dtype=torch.float32, name=name)
    assert actual[0].is_contiguous()


def swin_block(library):
    """A block of an 8 x 8 map with 2 heads of 4 channels, shifted windows of 4."""
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformerBlock

        return SwinTransformerBlock(8, (8, 8), 2, window_size=4, shift_size=2, always_partition=True)
    from torchvision.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(8, 2, [4, 4], [2, 2])  # its attention takes the parameters of its layers, and calls none


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_layers_around_windows(monkeypatch, library):
    """qkv and the projection run as convolutions with the attention, unless that is switched off or a layer is hooked."""
    plain = swin_block(library)
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops="window_attention")
    x = torch.randn(2, 8, 8, 8)

    def convolutions(m=model):
        with Calls() as calls:
            result = step(m, x)
        assert_agree(result, step(plain, x))
        return sum(op is torch.ops.aten.convolution for op in calls.seen), sum(op is torch.ops.aten.addmm for op in calls.seen)

    with fastconv.use_backend("cpu"):
        assert convolutions() == (2, 2), "the Mlp's two are left"
        monkeypatch.setattr(_linear, "PREFERS_CONVOLUTION", False)
        assert convolutions() == (0, 4)
        monkeypatch.setattr(_linear, "PREFERS_CONVOLUTION", True)
        monkeypatch.setattr(fastconv.ops._registry, "_disabled_ops", {"linear"})
        assert convolutions() == (0, 4)


def test_whole_mlp_runs_as_one(monkeypatch):
    """In a patched model too: its hidden map is never there as a whole, unless one of its two ops is not to run."""
    model, plain = pair()
    joined, calls = GELU_LINEAR.linear_gelu_linear, []
    monkeypatch.setattr("fastconv.patching._run_body.linear_gelu_linear", lambda *args: calls.append(args) or joined(*args))
    with fastconv.use_backend("cpu"):
        assert_agree(step(model, images()), step(plain, images()))
        assert len(calls) == 2 and backends(model).items() >= {"linear": "onednn", "gelu_linear": "cpu"}.items()
        model[0].mlp.act.register_forward_hook(lambda *_: None)
        model[1].mlp.fc1.register_forward_hook(lambda *_: None)
        assert_agree(step(model, images()), step(plain, images()))
        assert len(calls) == 2


def test_derivatives_of_every_order():
    leaves = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(_linear.as_convolution, leaves)
    assert torch.autograd.gradgradcheck(_linear.as_convolution, leaves)
    assert torch.autograd.gradcheck(lambda x, w: _linear.as_convolution(x, w, None), leaves[:2])


def test_compiled_layers_are_operators_of_their_own():
    """Traced, the convolution would get its map transposed; the operators take rows and give rows."""
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    compiled = torch.compile(_linear.as_convolution, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    results = []
    for f in (compiled, nn.functional.linear):
        y = f(x, weight, bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    ops = torch.ops.fastconv
    assert ops.pointwise_conv.default in seen and ops.pointwise_conv_backward.default in seen
    assert not any("convolution" in str(target) for target in seen)


@pytest.mark.parametrize("function", [_linear.as_convolution, fastconv.ops.gelu_linear], ids=lambda f: f.__name__)
def test_what_follows_may_work_in_place(function):
    """As nn.Dropout(inplace=True) does."""
    x, weight, bias, dy = (torch.randn(s) for s in ((2, 600, 8), (1200, 8), (1200,), (2, 600, 1200)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with fastconv.use_backend("cpu"):
        outs = [function(*leaves).mul_(2), function(*leaves).mul(2)]
    for in_place, expected in zip(*([out, *torch.autograd.grad(out, leaves, dy)] for out in outs), strict=True):
        assert torch.equal(in_place, expected)


def test_opcheck():
    x, weight, dy = torch.randn(6, 4), torch.randn(5, 4), torch.randn(6, 5)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(torch.ops.fastconv.pointwise_conv.default, (x, weight, bias), test_utils=tests)
    for needs in itertools.product((True, False), repeat=3):
        torch.library.opcheck(torch.ops.fastconv.pointwise_conv_backward.default, (dy, x, weight, *needs), test_utils=tests)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_layers(frozen):
    model, plain = pair()
    for m in (model, plain):
        for name in frozen:
            getattr(m[1].mlp.fc1, name).requires_grad_(False)
    actual, expected = step(model, images()), step(plain, images())
    assert_agree(actual, expected)
    assert site_of(model).backend == "onednn"


def _hook(block):
    block.mlp.fc2.register_forward_hook(lambda *_: None)


def _hook_on_the_container(block):
    block.mlp.register_forward_pre_hook(lambda *_: None)


def _adapter(block):
    class LoRA(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)

    block.mlp.fc1.__class__ = LoRA


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "a hook sits on mlp.fc2"),
        (_hook_on_the_container, "a hook sits on mlp"),
        (_adapter, "mlp.fc1 is a LoRA, not a Linear"),
    ],
)
def test_changed_after_patch(change, reason):
    """The original layers run. Nothing fused is lost, so there is no warning, not even under strict=True."""
    plain = make()
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops=("depthwise_conv_norm", "residual_scale", "linear"), strict=True)
    for m in (model, plain):
        change(m[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = step(model, images())
    assert_agree(actual, step(plain, images()))
    sites = [s for s in fastconv.report(model).sites if s.op == "linear"]
    assert [dict(s.fallbacks) for s in sites] == [{reason: 1}, {}]
    assert [s.backend for s in sites] == ["eager", "onednn"]
    assert f"linear ran the original code in 1 calls: {reason}" in str(fastconv.report(model))


def test_parametrized_layers_are_called():
    class Doubled(nn.Module):
        calls = 0

        def forward(self, weight):
            Doubled.calls += 1
            return 2 * weight

    model, plain = pair()
    for m in (model, plain):
        parametrize.register_parametrization(m[0].mlp.fc1, "weight", Doubled())
        parametrize.register_parametrization(m[1].mlp.fc2, "bias", Doubled())
    Doubled.calls = 0
    actual = step(model, images())
    assert Doubled.calls == 2, "once a call, as in the original"
    assert_agree(actual, step(plain, images()))


def test_other_dtypes_and_precisions_keep_the_matrix_product():
    model, _ = pair()

    def backend(x, m=model):
        m(x)
        return site_of(m).backend

    assert backend(images()) == "onednn"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backend(images()) == "eager"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert backend(images()) == "eager"
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.backends.mkldnn.flags(enabled=False):
        assert backend(images()) == "eager"
    assert backend(images()) == "onednn"
    assert backend(images().double(), copy.deepcopy(model).double()) == "eager"


def test_switches():
    model, plain = pair()
    with fastconv.use_backend("eager"):
        assert torch.equal(model(images()), plain(images()))
    assert site_of(model).backend == "eager" and not site_of(model).fallbacks
    fused = fastconv.patch(model, ops=OPS)
    assert "linear" not in {s.op for s in fused.sites}
    alone = fastconv.patch(model, ops="linear")
    assert {s.op for s in alone.sites} == {"linear"}
    assert_agree(step(model, images()), step(plain, images()))
    assert backends(model) == {"linear": "onednn"}
    code = "import fastconv.ops._registry as r; print(r.switched_off('linear'), r.switched_off('residual_scale') or 'on')"
    env = {**os.environ, "FASTCONV_DISABLE": "linear"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["FASTCONV_DISABLE", "on"], done.stderr


@pytest.mark.parametrize(("bound", "value"), [("MIN_ROWS", 71), ("MIN_PRODUCTS", 70 * 8 * 32 + 1), ("MIN_ELEMENTS", 70 * 32)])
def test_bounds(monkeypatch, bound, value):
    """Two images of 7 x 5 are 70 rows, of 8 channels and of 32."""
    model, _ = pair()
    fastconv.patch(model, ops="linear")
    monkeypatch.setattr(_linear, bound, value)
    model(images())
    assert site_of(model).backend == "eager"
    monkeypatch.setattr(_linear, bound, value - 1)
    model(images())
    assert site_of(model).backend == "onednn"


def test_elsewhere_nothing_is_listed(monkeypatch):
    monkeypatch.setattr(_linear, "PREFERS_CONVOLUTION", False)
    model, plain = pair()
    assert {s.op for s in fastconv.report(model).sites} == set(OPS)
    assert_agree(step(model, images()), step(plain, images()))
