"""patch on timm: ConvNeXt in all its forms."""

import copy

import pytest
import timm
import torch
from patch_contract import HEAD_AND_TAIL, V2, PatchContract, SingleProcessContract, assert_agree, randomise_, step
from torch import nn

import fastconv


def make(drop_path=0.0, **kw):
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 10, "drop_path_rate": drop_path, **kw}
    return timm.models.convnext.ConvNeXt(**sizes)


class TestConvNeXt(PatchContract):
    blocks = 5

    def make(self, drop_path=0.0):
        return make(drop_path)


class TestConvMlp(SingleProcessContract):
    blocks = 5

    def make(self, drop_path=0.0):
        return make(drop_path, conv_mlp=True, kernel_sizes=(3, 5, 7, 5), norm_eps=1e-5)


class TestConvNeXtV2(PatchContract):
    blocks = 5
    ops = V2

    def make(self, drop_path=0.0):
        return make(drop_path, use_grn=True, ls_init_value=None)


class TestOtherActivations(SingleProcessContract):
    """The forms of timm's test models: other activations, no convolution bias, an overlapping stem."""

    blocks = 5
    whole = False
    ops = HEAD_AND_TAIL

    def make(self, drop_path=0.0):
        return make(drop_path, act_layer="silu", conv_bias=False, stem_type="overlap_act", norm_eps=1e-5)


def images(batch=2):
    return torch.randn(batch, 3, 64, 48, generator=torch.Generator().manual_seed(4))


def test_convnext_tiny():
    with torch.device("meta"):
        report = fastconv.patch(timm.create_model("convnext_tiny"))
    assert report.blocks == (18, 18)
    assert len(report.fused) == 54


def test_convnextv2_tiny():
    with torch.device("meta"):
        report = fastconv.patch(timm.create_model("convnextv2_tiny", drop_path_rate=0.1))
    assert report.blocks == (18, 18)
    assert {s.op for s in report.native} == {"residual_scale"}  # the first block drops no path and has no scale
    assert [s.name for s in report.native] == ["stages.0.blocks.0"]


def test_every_convnext_of_timm_is_fused_or_says_why():
    """By structure alone, on the meta device. What is declined is named here."""
    declined = {}
    names = timm.list_models(["convnext*", "test_convnext*"])
    assert len(names) > 25
    for name in names:
        with torch.device("meta"):
            report = fastconv.patch(timm.create_model(name))
        fused, total = report.blocks
        assert total, name
        if fused != total:
            declined[name] = {s.reason for s in report.declined}
    assert set(declined) == {"convnext_atto_rms", "convnext_zepto_rms", "convnext_zepto_rms_ols", "test_convnext3"}
    assert declined.pop("test_convnext3") == {"the activation before mlp.fc2 is no GELU: mlp.act (SiLU)"}
    assert all("SimpleNorm2d" in reason or "RmsNorm2d" in reason for reasons in declined.values() for reason in reasons)


@pytest.mark.parametrize("norm", ["rmsnorm", "simplenorm", "layernorm2dfp32"])
def test_norms_that_are_no_layer_norm(norm):
    """The convolution stays with its norm; the tail is fused."""
    torch.manual_seed(0)
    plain = randomise_(make(conv_mlp=True, norm_layer=norm))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert {(s.op, s.status) for s in report.sites} == {
        ("depthwise_conv_norm", "declined"),
        ("residual_scale", "fused"),
        ("gelu_linear", "fused"),
    }
    assert report.blocks == (0, 5)
    assert_agree(step(model, images()), step(plain, images()))


def test_fast_norm_is_declined():
    """timm's switch for a LayerNorm that autocast leaves in half precision: other numbers, other dtypes."""
    timm.layers.set_fast_norm(True)
    try:
        report = fastconv.patch(make())
    finally:
        timm.layers.set_fast_norm(False)
    assert report.blocks == (0, 5)
    assert {s.op for s in report.declined} == {"depthwise_conv_norm"}


def test_dilated_stages():
    torch.manual_seed(0)
    plain = randomise_(make(output_stride=8))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert 0 < report.blocks[0] < 5
    assert all("undilated" in s.reason for s in report.declined)
    assert_agree(step(model, images()), step(plain, images()))


def test_timms_own_checkpointing():
    torch.manual_seed(0)
    model = randomise_(make(0.5))
    fastconv.patch(model)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        results.append(step(model, images(8)))
    assert_agree(*results)


def test_features_only():
    plain = timm.create_model("convnext_atto", features_only=True)
    randomise_(plain)
    model = copy.deepcopy(plain)
    assert fastconv.patch(model).blocks == (12, 12)
    assert_agree(step(model, images()), step(plain, images()))


def test_edgenext():
    torch.manual_seed(0)
    plain = randomise_(timm.create_model("edgenext_xx_small", num_classes=10)).eval()
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert report.blocks[0] == report.blocks[1] == 9 + 3, "and the MLPs of three attention blocks"
    assert_agree(step(model, images()), step(plain, images()))


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_maxxvit(conv_mlp):
    """Blocks that may pool before the convolution; their layer scale is a module of its own."""
    config = timm.models.maxxvit.MaxxVitConvCfg(stride_mode="pool", init_values=0.5, norm_layer="layernorm2d", norm_eps=1e-6)
    torch.manual_seed(0)
    kind = timm.models.maxxvit.ConvNeXtBlock
    plain = randomise_(
        nn.Sequential(*(kind(8, stride=stride, cfg=config, conv_mlp=conv_mlp, drop_path=drop) for stride, drop in ((1, 0), (2, 0.3))))
    )
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert report.blocks == (2, 2)
    assert {(s.name, s.op, s.status) for s in report.sites} == {
        ("0", "depthwise_conv_norm", "fused"),
        ("0", "residual_scale", "native"),
        ("1", "depthwise_conv_norm", "fused"),
        ("1", "residual_scale", "fused"),
        ("0", "gelu_linear", "fused"),
        ("1", "gelu_linear", "fused"),
    }
    pools = []
    for m in (model, plain):
        m[1].down.register_forward_hook(lambda m, *_: pools.append(m))
    x = torch.randn(6, 8, 12, 10)
    results = []
    for m in (model, plain):
        torch.manual_seed(3)
        results.append(step(m, x))
    assert_agree(*results)
    with fastconv.use_backend("eager"), torch.no_grad():
        model(x), plain(x)
    assert pools == [model[1].down, plain[1].down] * 2, "what lies before the convolution runs once"


def test_before_the_convolution_nothing_may_write_over_the_input():
    block = timm.models.maxxvit.ConvNeXtBlock(8, cfg=timm.models.maxxvit.MaxxVitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6))
    block.down = nn.ReLU(inplace=True)
    report = fastconv.patch(block)
    assert {s.reason for s in report.declined} == {"down writes over the input, which the shortcut needs"}
