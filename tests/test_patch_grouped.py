"""Grouped convolutions, module by module: the contract of patch, which are ours, and which stay torch's own."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from patch_contract import SingleProcessContract
from patch_helpers import assert_agree, fast_blocks, randomise_, relative, step, steps
from timm.layers import Conv2dSame, DropPath, ScaledStdConv2d, ScaledStdConv2dSame
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize

import fastconv
from fastconv.models import alexnet, nfnet
from fastconv.ops import _grouped
from fastconv.testing import RawCalls

pytestmark = pytest.mark.usefixtures("one_thread")
OP = "grouped_conv"
REAL_PASSES, REAL_NATIVE = _grouped.passes, _grouped.native_everywhere  # conftest.py replaces them
REAL_ROWS = _grouped._rows


class Stack(nn.Module):
    """Patches, then x + drop_path(conv(act(x))) where a convolution keeps the shape, and conv(act(x)) elsewhere."""

    def __init__(self, convs, drop_path=0.0):
        super().__init__()
        self.patches = nn.PixelUnshuffle(4)
        self.convs = nn.ModuleList(convs)
        self.act, self.drop_path = nn.GELU(), DropPath(drop_path)

    def forward(self, x):
        x = self.patches(x)[:, ::2]
        for conv in self.convs:
            y = conv(self.act(x))
            x = x + self.drop_path(y) if y.shape == x.shape else y
        return x


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class GroupedContract(SingleProcessContract):
    blocks = 3
    ops = compiled_ops = (OP,)

    @pytest.mark.parametrize("which", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
    def test_frozen_parameters(self, which):
        model, plain = self.pair()
        for m in (model, plain):
            for conv in m.convs:
                for name in which:
                    if getattr(conv, name) is not None:
                        getattr(conv, name).requires_grad_(False)
        actual, expected = step(model, self.images()), step(plain, self.images())
        assert len(actual[1]) < len(list(model.parameters()))
        assert_agree(actual, expected)

    @pytest.mark.parametrize("index", [0, 1], ids=("first", "second"))
    def test_hooks_on_inner_modules_are_declined(self, index):
        """The convolution has no inner modules; hooks of its own see what they always do."""
        model, plain = self.pair()
        seen = [[], []]
        for m, list_ in zip((model, plain), seen):
            m.convs[index].register_forward_hook(lambda _m, args, out, at=list_: at.append((args[0].shape, out.shape)))
        assert_agree(step(model, self.images()), step(plain, self.images()))
        assert seen[0] == seen[1] and len(seen[0]) == 1
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}

    def test_parametrized_weights(self):
        model, plain = self.pair()
        for m in (model, plain):
            parametrize.register_parametrization(m.convs[0], "weight", Doubled())
        assert_agree(step(model, self.images()), step(plain, self.images()))
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}
        fastconv.unpatch(model)
        assert not fast_blocks(model)


class TestConv2d(GroupedContract):
    def make(self, drop_path=0.0):
        convs = nn.Conv2d(24, 24, 3, padding=1, groups=6), nn.Conv2d(24, 48, 5, 2, padding=1, groups=3, bias=False)
        return Stack([*convs, nn.Conv2d(48, 48, 3, padding="same", groups=2)], drop_path)


class TestStandardised(GroupedContract):
    def make(self, drop_path=0.0):
        convs = [ScaledStdConv2dSame(24, 24, 3, stride=stride, groups=groups) for stride, groups in ((1, 6), (2, 3), (1, 2))]
        return Stack(convs, drop_path)


def sites(model):
    return [s for s in fastconv.patch(model).sites if s.op == OP]


@pytest.mark.parametrize(
    ("build", "name", "count"),
    [
        (timm.create_model, "resnext50_32x4d", 16),
        (timm.create_model, "regnetx_032", 25),
        (timm.create_model, "regnety_032", 21),
        (timm.create_model, "nfnet_f0", 22),
        (timm.create_model, "dm_nfnet_f0", 22),
        (torchvision.models.get_model, "resnext50_32x4d", 16),
        (fastconv.create_model, "resnext50_32x4d", 16),
        (fastconv.create_model, "regnetx_032", 25),
        (fastconv.create_model, "nfnet_f0", 22),
    ],
)
def test_models(build, name, count):
    with torch.device("meta"):
        model = build(name)
    assert [s.status for s in sites(model)] == count * ["fused"]


def test_selective_kernels():
    """Of the two branches of a selective-kernel block one is dilated."""
    with torch.device("meta"):
        found = sites(fastconv.create_model("skresnext50_32x4d"))
    assert sorted(s.status for s in found) == ["declined"] * 16 + ["fused"] * 16


def small_resnext():
    return timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=5, cardinality=8, base_width=4)


def small_nfnet():
    return nfnet.NormFreeNet(depths=(1, 1, 1, 1), widths=(32, 32, 32, 32), stem=16, group_width=8, num_classes=5)


MODELS = {
    "timm resnext": (small_resnext, 4),
    "timm nfnet": (
        lambda: timm.create_model(
            "nfnet_f0", num_classes=5, depths=(1, 1, 1, 1), channels=(32,) * 4, num_features=64, stem_chs=16, group_size=8
        ),
        8,
    ),
    "timm dm_nfnet": (
        lambda: timm.create_model(
            "dm_nfnet_f0", num_classes=5, depths=(1, 1, 1, 1), channels=(32,) * 4, num_features=64, stem_chs=16, group_size=8
        ),
        8,
    ),
    "timm same": (lambda: nn.Sequential(Conv2dSame(3, 24, 3), Conv2dSame(24, 24, 3, 2, groups=6), Conv2dSame(24, 48, 5, 2, groups=3)), 2),
    "timm standardised": (lambda: nn.Sequential(ScaledStdConv2d(3, 24, 3), ScaledStdConv2d(24, 24, 3, 2, groups=6)), 1),
    "bundled nfnet": (small_nfnet, 8),
    "torchvision regnet": (
        lambda: torchvision.models.regnet.RegNet(torchvision.models.regnet.BlockParams.from_init_params(1, 16, 8.0, 2.0, 8), num_classes=5),
        1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=("nchw", "nhwc"))
def test_a_model_of_each_library(name, layout):
    build, count = MODELS[name]
    torch.manual_seed(0)
    plain = randomise_(build()).eval().to(memory_format=layout)
    model = copy.deepcopy(plain)
    assert [s.status for s in sites(model)] == count * ["fused"]
    count = 6 if any(p.numel() == 1 for p in plain.parameters()) else 1
    batches = torch.randn(count, 2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    batches = [x.to(memory_format=layout) for x in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        truth = steps(copy.deepcopy(plain).double(), [x.double() for x in batches])
        assert_agree(steps(model, batches), steps(plain, batches), truth)
    assert {s.backend for s in fastconv.report(model).sites if s.op == OP} == {"cpu"}


NAMED = [
    (timm.create_model, "resnext50_32x4d", 16),
    (timm.create_model, "regnetx_032", 25),
    (timm.create_model, "regnety_032", 21),
    (timm.create_model, "nfnet_f0", 22),
    (torchvision.models.get_model, "resnext50_32x4d", 16),
    (torchvision.models.get_model, "regnet_x_400mf", 22),
    (fastconv.create_model, "alexnet_two_groups", 1),
]


def smooth_(model):
    """SiLU for ReLU: of millions of values some lie within rounding of zero, and a ReLU that takes the other side there moves the
    gradient of everything before it by 1e-4 to 3e-3, eager's from float64 as often as ours."""
    for m in list(model.modules()):
        for name, child in m.named_children():
            if isinstance(child, nn.ReLU):
                setattr(m, name, nn.SiLU())
    return model


@pytest.mark.parametrize(("build", "name", "count"), NAMED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=("nchw", "nhwc"))
@pytest.mark.slow
def test_a_whole_model(build, name, count, layout):
    """Outputs and every gradient, each grouped convolution on our kernels, whatever the table says of its size."""
    torch.manual_seed(0)
    plain = randomise_(build(name, num_classes=10)).eval().to(memory_format=layout)
    x = torch.randn(2, 3, 67, 75, generator=torch.Generator().manual_seed(4)).to(memory_format=layout)
    for original, x_, close in ((copy.deepcopy(plain).double(), x.double(), 1e-9), (smooth_(plain), x, 1e-4)):
        model = copy.deepcopy(original)
        assert [s.status for s in sites(model) if s.status == "fused"] == count * ["fused"]
        actual, expected = step(model, x_), step(original, x_)
        assert_agree(actual, expected)
        assert all(relative(g, expected[1][n]) <= close for n, g in actual[1].items())
        assert {s.backend for s in fastconv.report(model).sites if s.op == OP and s.status == "fused"} == {"cpu"}


class Own(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=2, dilation=2), r"undilated, not \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="reflect"), "padded with zeros, not by reflect"),
        (nn.Conv2d(8, 8, (3, 5), groups=2), r"size 1, 3, 5 or 7, not \(3, 5\)"),
        (nn.Conv2d(8, 8, 9, groups=2), r"size 1, 3, 5 or 7, not \(9, 9\)"),
        (nn.Conv2d(384, 256, 3, groups=2), "2 to 128 channels a group, not 192 to 128"),
        (nn.Conv2d(8, 2, 3, groups=2), "2 to 128 channels a group, not 4 to 1"),
        (nn.ConvTranspose2d(8, 8, 3, groups=2), "ConvTranspose2d, whose forward fastconv does not know"),
        (Own(8, 8, 3, groups=2), "Own, whose forward fastconv does not know"),
    ],
)
def test_declined(conv, reason):
    model = nn.Sequential(conv)
    with pytest.raises(RuntimeError, match=reason):
        fastconv.patch(model, strict=True)
    (site,) = sites(model)
    assert site.status == "declined"
    assert not fast_blocks(model)


def test_depthwise_and_ungrouped_are_not_sites():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3))
    assert not sites(model)
    report = fastconv.patch(alexnet.alexnet_two_groups(), ops=OP)
    assert [(s.name, s.status) for s in report.sites] == [("conv2", "fused"), ("conv4", "declined"), ("conv5", "declined")]


def test_filter_and_unpatch():
    model = Stack([nn.Conv2d(24, 24, 3, padding=1, groups=6) for _ in range(2)])
    report = fastconv.patch(model, filter_fn=lambda name, _: name == "convs.1")
    assert [s.name for s in report.sites] == ["convs.1"]
    assert len(fast_blocks(model)) == 1


ODD = {
    "unbatched": (lambda: torch.randn(8, 6, 6), r"not \(N, C, H, W\)"),
    "too small": (lambda: torch.randn(1, 8, 2, 2), "smaller than the kernel"),
    "another dtype": (lambda: torch.randn(1, 8, 6, 6).bfloat16(), "different dtypes"),
}


@pytest.mark.parametrize("name", ODD)
def test_inputs_that_fall_back(name):
    """The original's results, and the original's errors."""
    make, reason = ODD[name]
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    results = []
    for m in (plain, model):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results.append(m(make()))
            except RuntimeError as error:
                results.append(str(error))
    assert str(results[0]) == str(results[1])
    assert any(reason.replace("\\", "") in str(w.message) for w in caught)


# --- where torch's own kernel is chosen


@pytest.fixture
def table(monkeypatch):
    """The real choice, from a table of one row: 3x3 of 4 channels a group in float32, from 14 pixels on."""
    rows = {key: ({4: 14}, {4: 28}, {}) for key in ((torch.float32, nhwc, 1) for nhwc in (False, True))}
    monkeypatch.setattr(_grouped, "passes", REAL_PASSES)
    monkeypatch.setattr(_grouped, "native_everywhere", REAL_NATIVE)
    monkeypatch.setattr(_grouped, "_rows", lambda *key: rows.get(key))


def called(model, x, **kwargs):
    with RawCalls() as recorded:
        step(model, x) if kwargs.get("train", True) else model(x)
    return [func.__name__.split(".")[0].removeprefix(OP + "_") for func, *_ in recorded.calls]


def test_sites_that_the_table_never_gives_us_stay_untouched(table):
    model = Stack([nn.Conv2d(24, 24, 3, padding=1, groups=3), nn.Conv2d(24, 24, 3, padding=1, groups=6)])
    classes = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [(s.status, bool(s.reason)) for s in sites(model)] == [("native", True), ("fused", False)]
    assert [type(m) is c for m, c in zip(model.modules(), classes)].count(False) == 1
    wide = Stack([nn.Conv2d(24, 24, K, padding=K // 2, stride=s, groups=6) for K, s in ((5, 1), (3, 2))])
    assert [s.status for s in sites(wide)] == ["native", "native"]
    assert [s.status for s in sites(Stack([nn.Conv2d(24, 24, 3, padding=1, groups=6)]).bfloat16())] == ["native"]


@pytest.mark.parametrize(("side", "expected"), [(28, ["fwd", "bwd"]), (14, ["fwd"]), (13, [])])
def test_each_pass_by_its_own_kernel(table, side, expected):
    """dx from 28 pixels on, forward from 14, dweight never: the results agree whichever runs."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=16))
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    x = torch.randn(2**18 // (64 * side**2) + 1, 64, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(model, x) == expected
        assert called(model, x[:1]) == [], "too little work"
    assert fastconv.report(model).sites[0].backend == "native" and fastconv.report(model).sites[0].status == "fused"
    assert_agree(step(model, x), step(plain, x))
    (site,) = fastconv.report(model).sites
    assert site.backend == ("cpu" if expected else "native")
    kernel = {28: "ours but for dweight", 14: "ours but for dx and dweight", 13: "torch's own"}[side]
    assert site.why == f"{kernel}, by the table for such sizes" and site.why in str(fastconv.report(model))
    assert fastconv.report(copy.deepcopy(model)).sites[0].why == ""
    x = x.bfloat16()
    assert called(model.bfloat16(), x) == [], "the table has no bfloat16"
    with fastconv.use_backend("cpu"):
        assert called(model, x) == ["fwd", "bwd"]
    assert fastconv.report(model).sites[0].why == ""


@pytest.mark.parametrize("dynamic", [False, True], ids=("static", "dynamic"))
def test_the_choice_under_compile(table, dynamic, monkeypatch):
    """As without: of two widths, one in every row of the table, with sizes on both sides of its limits."""
    monkeypatch.setattr(_grouped, "_rows", REAL_ROWS)
    monkeypatch.setattr(_grouped, "_MEASURED", True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(_grouped, "_TABLE", {("AVX512", torch.float32, False, 1): ({4: 14, 8: 99}, {4: 28}, {4: 14})})
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=8), nn.Conv2d(64, 64, 3, padding=1, groups=16))
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    kernels = []

    def capture(graph, _):
        kernels.append(sum(f"{OP}_fwd" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(
        model, backend=aot_autograd(fw_compiler=capture, bw_compiler=lambda graph, _: graph), fullgraph=True, dynamic=dynamic
    )
    for side in (28, 14, 13):
        x = torch.randn(2**18 // (64 * side**2) + 1, 64, side, side)
        assert_agree(step(model, x, compiled), step(plain, x))
    assert kernels == [1, 1, 0]


def test_inference_asks_for_the_forward_alone(table, monkeypatch):
    monkeypatch.setattr(_grouped, "_rows", lambda *key: ({}, {4: 7}, {4: 7}))
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=16))
    fastconv.patch(model)
    x = torch.randn(8, 64, 28, 28)
    with torch.no_grad():
        assert called(model, x, train=False) == []
    assert fastconv.report(model).sites[0].why.startswith("torch's own")
    assert called(model, x) == ["bwd"]
    assert fastconv.report(model).sites[0].why.startswith("ours but for fwd")


def test_the_table_is_read_by_processor_layout_and_stride(monkeypatch):
    monkeypatch.setattr(_grouped, "_MEASURED", True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    shape = _grouped.Shape(8, 96, 56, 56, 96, 3, (1, 1), (1, 1), 24)
    assert REAL_PASSES("cpu", {torch.float32}, 4, shape, False) == (True, True, True)
    assert REAL_PASSES("cpu", {torch.float32}, 4, shape._replace(K=5, padding=(2, 2)), False) == _grouped.NONE
    assert REAL_PASSES("cpu", {torch.float32}, 16, shape, False) == _grouped.NONE
    assert REAL_PASSES("cuda", {torch.float32}, 4, shape, False) == _grouped.NONE
    assert REAL_PASSES("cpu", {torch.float32, torch.bfloat16}, 4, shape, False) == _grouped.NONE
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert REAL_PASSES("cpu", {torch.float32}, 4, shape, False) == _grouped.NONE
    monkeypatch.setattr(_grouped, "_MEASURED", False)
    assert REAL_NATIVE(torch.empty(96, 4, 3, 3), 24, (1, 1)) == _grouped.UNMEASURED
