"""GELU + GRN and GELU + linear inside the blocks of every library."""

import copy
import importlib
import warnings

import pytest
import timm
import torch
from official_convnext import Network, ResponseNorm
from patch_contract import HEAD_AND_TAIL, V2, SingleProcessContract
from patch_helpers import assert_agree, randomise_, relative, step, steps
from patch_small import images, make, pair
from timm.layers import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.nn.utils import parametrize
from transformers import ConvNextV2Config, ConvNextV2Model

import fastconv
from fastconv.models.convnextv2 import GRN, ConvNeXtV2
from fastconv.models.fcmae import FCMAE

csatv2 = importlib.import_module("timm.models.csatv2")  # timm.models.csatv2 is the function
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def csatv2_with_frozen_gates():
    model = csatv2.CSATv2(10, dims=(16, 24, 32, 48), depths=(2, 2, 3, 3), transformer_depths=(0, 0, 1, 1))
    for module in model.modules():
        if isinstance(module, csatv2.Block):
            module.attn.requires_grad_(False)
    return model


class OfOurs(SingleProcessContract):
    """Models of classes of fastconv's own: their names are in what is saved."""

    def test_nothing_of_ours_in_a_module_dict(self):
        model, plain = self.pair()
        step(model, self.images())
        for (name, a), b in zip(model.named_modules(), plain.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys(), name


class TestBundled(OfOurs):
    blocks = 5
    ops = V2

    def make(self, drop_path=0.0):
        return ConvNeXtV2(**SMALL, num_classes=10, drop_path_rate=drop_path)


class TestConvMlp(SingleProcessContract):
    """GRN and 1x1 convolutions on (N, C, H, W), as timm's small V2 models have them."""

    blocks = 5
    ops = V2

    def build(self, drop_path=0.0, seed=3):  # one at which none of eager's errors in bfloat16 is a lucky one
        return super().build(drop_path, seed)

    def make(self, drop_path=0.0):
        return timm.models.convnext.ConvNeXt(
            **SMALL, num_classes=10, drop_path_rate=drop_path, use_grn=True, ls_init_value=None, conv_mlp=True, act_layer="gelu_tanh"
        )


class TestMasked(OfOurs):
    """FCMAE's encoder: blocks that take a mask."""

    blocks = 5
    ops = V2

    class Encoder(nn.Module):
        def __init__(self, drop_path):
            super().__init__()
            self.encoder = FCMAE(**SMALL, decoder_dim=8, drop_path_rate=drop_path).encoder
            self.register_buffer("mask", torch.rand(12, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5)

        def forward(self, x):
            return self.encoder(x, self.mask[: len(x)])

    def make(self, drop_path=0.0):
        return self.Encoder(drop_path)

    def images(self, batch=2):
        return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(2))

    def test_other_arguments(self):
        model, plain = self.pair()
        x, mask = torch.randn(2, 8, 6, 6), torch.zeros(2, 6, 6, 1, dtype=torch.bool)
        with pytest.warns(RuntimeWarning, match="called with other arguments"):
            assert torch.equal(model.encoder.stages[0][0](x, masked=mask), plain.encoder.stages[0][0](x, mask))


def v2_blocks(conv_mlp=False, **kw):
    torch.manual_seed(0)
    return randomise_(nn.Sequential(*(ConvNeXtBlock(8, ls_init_value=None, use_grn=True, conv_mlp=conv_mlp, **kw) for _ in range(2))))


MODELS = {
    "timm convnextv2_atto": (lambda: timm.create_model("convnextv2_atto", num_classes=10), 12, "none"),
    "timm convnextv2_tiny": (lambda: timm.create_model("convnextv2_tiny", num_classes=10), 18, "none"),
    "timm test_convnext": (lambda: timm.create_model("test_convnext", use_grn=True, ls_init_value=None), 9, "tanh"),
    "timm test_convnext2": (lambda: timm.create_model("test_convnext2", use_grn=True, ls_init_value=None, conv_mlp=True), 4, "tanh"),
    "timm test_convnext3": (lambda: timm.create_model("test_convnext3", use_grn=True, ls_init_value=None), 4, None),
    "hf": (lambda: ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])), 5, "none"),
    "official": (lambda: Network(scale=0.0, grn=True), 3, "none"),
    "timm csatv2": (csatv2_with_frozen_gates, 8, "none"),
    "bundled": (lambda: ConvNeXtV2(**SMALL, num_classes=10), 5, "none"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "tiny" in n else ()) for n in MODELS])
def test_every_family(name):
    build, sites, gelu = MODELS[name]
    torch.manual_seed(0)
    plain = randomise_(build()).eval()
    assert any(p.abs().min() > 0 for n, p in plain.named_parameters() if "grn" in n), "GRN is the identity: nothing would be tested"
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    norms = [s for s in report.fused if s.op == "global_response_norm"]
    assert report.blocks[0] == report.blocks[1] and len(norms) == sites
    assert all(s.type == "Mlp" for s in report.sites if s.op == "gelu_linear"), "those of csatv2's attention"
    assert {model.get_submodule(s.name)._fastconv.layout.body.fusions[0].gelu for s in norms} == {gelu}
    # csatv2's gates and attention magnify rounding: of one batch eager's errors are up to 7 times ours, or ours eager's.
    several, size = (6, (128, 96)) if "csat" in name else (1, (64, 48))
    batches = torch.randn(several, 2, 3, *size, generator=torch.Generator().manual_seed(4)).unbind()
    truths = steps(copy.deepcopy(plain).double(), [x.double() for x in batches]) if several == 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_agree(steps(model, batches), steps(plain, batches), truths)
        x = batches[0]
        truth = step(copy.deepcopy(plain).double(), x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, expected = step(model, x), step(plain, x)
    for a, b, t in zip(
        (*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), (*truth[0], *truth[1].values()), strict=True
    ):
        assert a.dtype == b.dtype
        assert relative(a, t) <= 3 * relative(b, t) + 8e-3
    assert {s.backend for s in report.fused if s.op == "global_response_norm"} == {"cpu"}


def test_counts_of_the_large_ones():
    for create, name, sites in (
        (timm.create_model, "convnextv2_tiny", 18),
        (timm.create_model, "csatv2", 14),
        (fastconv.create_model, "convnextv2_huge", 36),
    ):
        with torch.device("meta"):
            report = fastconv.patch(create(name))
        assert sum(s.op == "global_response_norm" for s in report.fused) == sites
        assert report.blocks[0] == report.blocks[1]


# --- calls that fall back


def _hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *_: None)


def _drop(block):
    block.mlp.drop1.p = 0.3


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _parametrize(path, name):
    return lambda block: parametrize.register_parametrization(block.get_submodule(path), name, Doubled())


def _adapter(block):
    class LoRA(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)

    block.mlp.fc2.__class__ = LoRA


def _own_forward(block):
    inner = block.mlp.grn.forward
    block.mlp.grn.forward = lambda x: 2 * inner(x)


CHANGES = [
    ("v2", _hook("mlp.act"), "a hook sits on mlp.act"),
    ("v2", _hook("mlp.drop1"), "a hook sits on mlp.drop1"),
    ("v2", _hook("mlp.grn"), "a hook sits on mlp.grn"),
    ("v2", _hook("mlp"), "a hook sits on mlp"),
    ("v2", _drop, "mlp.drop1 drops values"),
    ("v2", _parametrize("mlp.grn", "weight"), "mlp.grn is a Parametrized|the weight of mlp.grn is parametrized"),
    ("v2", _own_forward, "the forward of mlp.grn is replaced on the instance"),
    ("v1", _hook("mlp.act"), "a hook sits on mlp.act"),
    ("v1", _hook("mlp.fc2"), "a hook sits on mlp.fc2"),
    ("v1", _hook("mlp"), "a hook sits on mlp"),
    ("v1", _drop, "mlp.drop1 drops values"),
    ("v1", _parametrize("mlp.fc2", "bias"), "the bias of mlp.fc2 is parametrized"),
    ("v1", _adapter, "mlp.fc2 is a LoRA, not a Linear"),
]


@pytest.mark.parametrize(("kind", "change", "reason"), CHANGES)
def test_changed_after_patch(kind, change, reason):
    """The layers themselves run, dropout with the model's own random numbers; all else stays fused."""
    plain = v2_blocks() if kind == "v2" else make()
    model = copy.deepcopy(plain)
    op = {"v2": "global_response_norm", "v1": "gelu_linear"}[kind]
    fastconv.patch(model)
    results, states = [], []
    for m in (model, plain):
        change(m[0])
        torch.manual_seed(5)
        if m is model:
            with pytest.warns(RuntimeWarning, match=reason):
                results.append(step(m, images()))
        else:
            results.append(step(m, images()))
        states.append(torch.get_rng_state())
    assert_agree(*results)
    assert torch.equal(*states)
    sites = [s for s in fastconv.report(model).sites if s.op == op]
    assert [sum(s.fallbacks.values()) for s in sites] == [1, 0]
    assert [s.backend for s in sites] == ["eager", "cpu"]
    assert not any(s.fallbacks for s in fastconv.report(model).sites if s.op != op)


def test_dropout_counts_only_in_training():
    model, plain = pair()
    for m in (model, plain):
        m[0].mlp.drop1.p = 0.3
        m.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agree(step(model, images()), step(plain, images()))


def test_layer_before_that_gives_another_dtype():
    plain = v2_blocks()
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    for m in (model, plain):
        m[0].mlp.fc1.register_forward_hook(lambda _m, _a, out: out.bfloat16())
    actual, expected = step(model, images()), step(plain, images())
    for n, g in expected[1].items():
        assert actual[1][n].dtype == g.dtype and relative(actual[1][n], g) < 3e-2, n
    assert {s.backend for s in fastconv.report(model).sites if s.op == "global_response_norm"} == {"cpu"}
    model, plain = pair()
    for m in (model, plain):
        m[0].mlp.fc1.register_forward_hook(lambda _m, _a, out: out.bfloat16())
    with pytest.raises(RuntimeError) as expected:
        plain(images())
    reason = r"the input of mlp\.fc2 and its parameters have different dtypes"
    with pytest.warns(RuntimeWarning, match=reason), pytest.raises(RuntimeError) as actual:
        model(images())
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("op", ["global_response_norm", "gelu_linear"])
def test_one_op_alone(op):
    plain = v2_blocks() if op == "global_response_norm" else make()
    model = copy.deepcopy(plain)
    report = fastconv.patch(model, ops=op)
    assert {s.op for s in report.sites} == {op}
    assert_agree(step(model, images()), step(plain, images()))
    assert {s.backend for s in fastconv.report(model).sites} == {"cpu"}
    assert not any(s.op == op for s in fastconv.patch(model, ops=HEAD_AND_TAIL).sites)
    assert_agree(step(model, images()), step(plain, images()))


# --- what is no GELU + GRN or GELU + linear from the start


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        ("quick_gelu", "no GELU: mlp.act (QuickGELU)"),
        ("relu", "no GELU: mlp.act (ReLU)"),
        ("silu", "no GELU: mlp.act (SiLU)"),
    ],
)
def test_other_activations(activation, reason):
    plain = make(act_layer=activation)
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    (declined,) = {s.reason for s in report.declined}
    assert {s.op for s in report.declined} == {"gelu_linear"} and reason in declined
    assert_agree(step(model, images()), step(plain, images()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"drop1": nn.Dropout(0.2)}, "mlp.drop1 (Dropout) lies beside the GELU before mlp.fc2"),
        ({"norm": nn.LayerNorm(32)}, "mlp.norm (LayerNorm) lies beside the GELU before mlp.fc2"),
    ],
)
def test_layers_between_gelu_and_linear(change, reason):
    plain = make()
    for block in plain:
        for name, child in change.items():
            setattr(block.mlp, name, copy.deepcopy(child))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert {(s.op, s.reason) for s in report.declined} == {("gelu_linear", reason)}
    results = []
    for m in (model, plain):
        torch.manual_seed(1)
        results.append(step(m, images()))
    assert_agree(*results)


def test_dropout_before_grn_leaves_the_norm_alone():
    plain = v2_blocks()
    for block in plain:
        block.mlp = randomise_(GlobalResponseNormMlp(8, 32, drop=0.3))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert not report.declined and {b._fastconv.layout.body.fusions[0].gelu for b in model} == {None}
    results = []
    for m in (model, plain):
        torch.manual_seed(1)
        results.append(step(m, images()))
    assert_agree(*results)
    assert {s.backend for s in report.fused if s.op == "global_response_norm"} == {"cpu"}


class Grn(ResponseNorm):
    """What may vary: the order of the norm, its dimensions, the mean's, eps, and how the sum is written."""

    order, dims, mean_dim, eps = 2, (1, 2), -1, 1e-6

    def forward(self, x):
        energy = torch.norm(x, p=self.order, dim=self.dims, keepdim=True)
        return self.combine(x, energy / (energy.mean(dim=self.mean_dim, keepdim=True) + self.eps))

    def combine(self, x, n):
        return torch.addcmul(self.beta + x, self.gamma, n * x)


def _variant(**changes):
    return type("VariantGRN", (Grn,), changes)


class InPlaceGRN(Grn):
    def forward(self, x):
        x.clamp_(min=0)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "eps"),
    [
        (Grn, 1e-6),
        (_variant(eps=1e-3), 1e-3),
        (_variant(dims=(-3, -2), mean_dim=3), 1e-6),
        (_variant(combine=lambda s, x, n: x * n * s.gamma + (s.beta + x)), 1e-6),
        (_variant(order=1), None),
        (_variant(dims=(0, 1, 2)), None),
        (_variant(dims=(2, 3), mean_dim=1), None),
        (_variant(mean_dim=1), None),
        (_variant(combine=lambda s, x, n: s.gamma * (x * n) + s.beta), None),
        (_variant(combine=lambda s, x, n: s.gamma * n + s.beta + x), None),
        (_variant(combine=lambda s, x, n: s.gamma * (x * n) + s.beta - x), None),
        (InPlaceGRN, None),
        (GRN, 1e-6),
    ],
)
def test_what_a_norm_computes_is_read(kind, eps):
    torch.manual_seed(0)
    plain = nn.Sequential(*Network(scale=0.0, grn=True).stage1)
    for block in plain:
        block.grn = kind(64)
    randomise_(plain)
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    x = torch.randn(2, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    assert_agree(step(model, x), step(plain, x))
    if eps is None:
        assert {(s.op, s.status) for s in report.sites if "norm" in s.op} == {
            ("depthwise_conv_norm", "fused"),
            ("global_response_norm", "declined"),
        }
        assert all("not a global response norm that fastconv knows" in s.reason or "does not take" in s.reason for s in report.declined)
    else:
        assert not report.declined
        assert {f.eps for b in model for f in b._fastconv.layout.body.fusions} == {eps}
