"""patch on Swin and Swin V2, of every library and in the official form: the attention runs on the map as it lies."""

import copy
import math
import warnings

import official_swin
import pytest
import torch
from patch_contract import PatchContract, SingleProcessContract, assert_agree, child_at, fast_blocks, randomise_, step, twins
from test_patch_memory import saved_bytes
from timm.models import swin_transformer, swin_transformer_v2
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torchvision.models import swin_transformer as tv_swin
from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

import fastconv
from fastconv.models import swin, swin_v2

pytestmark = pytest.mark.usefixtures("one_thread")
OP = "window_attention"
SIZES = dict(embed_dim=32, depths=(1, 2), num_heads=(2, 4))
HF_SIZES = dict(image_size=(64, 40), embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=4)


def without_mlp(model):
    """The MLPs under names that no rule knows: what is patched is the attention alone."""
    for block in model.modules():
        mlp = getattr(block, "mlp", None)
        if mlp is not None:
            width = next(p for p in mlp.parameters() if p.dim() == 2).shape[1]
            block.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
    return model


def without_key_bias_gradient(model):
    """Softmax does not see the bias of all keys: where it is a parameter of its own, its gradient is rounding."""
    for name, p in model.named_parameters():
        if name.endswith("k_proj.bias"):
            p.requires_grad_(False)
    return model


def timm_v1(drop_path=0.0, **kw):
    kw = {"img_size": (64, 40), "window_size": 4, **SIZES, **kw}
    return swin_transformer.SwinTransformer(drop_path_rate=drop_path, num_classes=5, **kw)


def timm_v2(drop_path=0.0, **kw):
    kw = {"img_size": (64, 32), "window_size": 4, **SIZES, **kw}
    return swin_transformer_v2.SwinTransformerV2(drop_path_rate=drop_path, num_classes=5, **kw)


def torchvision_v1(drop_path=0.0, window=(4, 4), **kw):
    return tv_swin.SwinTransformer([4, 4], 32, [1, 2], [2, 4], list(window), stochastic_depth_prob=drop_path, num_classes=5, **kw)


def torchvision_v2(drop_path=0.0, **kw):
    return torchvision_v1(drop_path, block=tv_swin.SwinTransformerBlockV2, downsample_layer=tv_swin.PatchMergingV2, **kw)


def bundled_v1(drop_path=0.0, **kw):
    return swin.SwinTransformer(**SIZES, window_size=4, img_size=64, num_classes=5, drop_path_rate=drop_path, **kw)


def bundled_v2(drop_path=0.0, **kw):
    return swin_v2.SwinTransformerV2(**SIZES, window_size=4, img_size=64, num_classes=5, drop_path_rate=drop_path, **kw)


def hf_v1(drop_path=0.0, **kw):
    return SwinModel(SwinConfig(**{**HF_SIZES, "drop_path_rate": drop_path, **kw}))


def hf_v2(drop_path=0.0, **kw):
    return Swinv2Model(Swinv2Config(**{**HF_SIZES, "image_size": (64, 32), "drop_path_rate": drop_path, **kw}))


def official_v1(drop_path=0.0, **kw):
    return official_swin.Network(drop_path=drop_path, **kw)


def official_v2(drop_path=0.0, **kw):
    return official_swin.Network(drop_path=drop_path, block=official_swin.BlockV2, **kw)


FAMILIES = (timm_v1, timm_v2, torchvision_v1, torchvision_v2, bundled_v1, bundled_v2, hf_v1, hf_v2, official_v1, official_v2)


def images(family, batch=2, size=None):
    """Maps of 16 x 10 and 8 x 5 with windows of 4, or of whole windows: the official code has no others, and in float16 V2 gives
    NaN where it pads, because the key of a padded token is zero and 1e-12, which its norm is at least, too."""
    whole = {official_v1: 48, official_v2: 48, bundled_v1: 32, timm_v2: 32, torchvision_v2: 32, bundled_v2: 32, hf_v2: 32}
    size = size or (64, whole.get(family, 40))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


class AttentionContract(SingleProcessContract):
    blocks = 3
    ops = compiled_ops = (OP,)
    parts = ("attn.qkv", "attn.proj")
    family = staticmethod(timm_v1)

    def make(self, drop_path=0.0):
        return without_mlp(self.family(drop_path))

    def images(self, batch=2):
        return images(self.family, batch)


class WeightsOnly(AttentionContract):
    """The original does not call the linear layers `unused`, it reads their parameters: a hook on them never fires."""

    unused = ("attn.qkv",)

    def test_hooks_on_inner_modules_are_declined(self):
        model, plain = self.pair()
        fired = []
        for m in (fast_blocks(model)[0], twins(model, plain)[0]):
            for path in self.unused:
                child_at(m, path).register_forward_hook(lambda *_: fired.append(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert_agree(step(model, self.images()), step(plain, self.images()))
        assert not fired


class TestTimm(AttentionContract):
    pass


@pytest.mark.slow
class TestTimmInProcesses(AttentionContract, PatchContract):
    pass


class TestTorchvisionV2(WeightsOnly):
    family = staticmethod(torchvision_v2)
    parts = unused = ("qkv", "proj")

    @pytest.mark.slow
    def test_compile_fullgraph(self):
        super().test_compile_fullgraph()


@pytest.mark.slow
class TestTorchvision(TestTorchvisionV2):
    family = staticmethod(torchvision_v1)


@pytest.mark.slow
class TestTimmV2(WeightsOnly):
    family = staticmethod(timm_v2)


class OwnModels:
    """Their classes are fastconv's own: what matters is that no attribute is."""

    parts = ("qkv", "proj")

    def test_nothing_of_ours_in_a_module_dict(self):
        model, plain = self.pair()
        step(model, self.images())
        for (name, a), b in zip(model.named_modules(), plain.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys(), name


@pytest.mark.slow
class TestBundled(OwnModels, AttentionContract):
    family = staticmethod(bundled_v1)


@pytest.mark.slow
class TestBundledV2(OwnModels, WeightsOnly):
    family = staticmethod(bundled_v2)
    unused = ("qkv",)


@pytest.mark.slow
class TestHuggingFace(AttentionContract):
    family = staticmethod(hf_v1)
    parts = ("attention.q_proj", "attention.o_proj")

    def make(self, drop_path=0.0):
        return hf_v1(drop_path, qkv_bias=False)


@pytest.mark.slow
class TestHuggingFaceV2(AttentionContract):
    family = staticmethod(hf_v2)
    parts = ("attention.self.query", "attention.output.dense")


@pytest.mark.slow
class TestOfficial(AttentionContract):
    family = staticmethod(official_v1)


@pytest.mark.slow
class TestOfficialV2(WeightsOnly):
    family = staticmethod(official_v2)


def agree(model, x, **patch):
    """Patch a copy, see that it computes the same, without a fallback, and return it with the report."""
    plain = without_key_bias_gradient(randomise_(model)).eval()
    model = copy.deepcopy(plain)
    report = fastconv.patch(model, **patch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_agree(step(model, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()))
    assert {s.backend for s in report.fused if s.op == OP} == {"cpu"}
    return model, report


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_every_family(family):
    """Attention and MLP together, in eval mode and in training, where drop path draws as it did."""
    torch.manual_seed(0)
    x = images(family, batch=6)
    model, report = agree(family(drop_path=0.5), x)
    assert len([s for s in report.fused if s.op == OP]) == 3 and not report.declined, str(report)
    plain = fastconv.unpatch(copy.deepcopy(model)).train()
    results = []
    for m in (model.train(), plain):
        torch.manual_seed(7)
        results.append((step(m, x), torch.get_rng_state()))
    assert_agree(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


PADDED = {  # maps of 15 x 10 and 8 x 5, or as the images say, which windows of 4 do not fill
    "timm": lambda: timm_v1(img_size=(60, 40)),
    "timm v2": lambda: timm_v2(img_size=(60, 40)),
    "timm, any size": lambda: timm_v1(img_size=(64, 64), strict_img_size=False),
    "timm, rectangular windows": lambda: timm_v1(img_size=(60, 40), window_size=((4, 3), (2, 5))),
    "timm, one window shifted": lambda: timm_v1(img_size=(60, 40), window_size=8, always_partition=True),
    "timm v2, windows from 8": lambda: timm_v2(img_size=(60, 40), window_size=(3, 4), pretrained_window_sizes=(8, 8)),
    "torchvision": lambda: torchvision_v1(window=(4, 3)),
    "torchvision v2": torchvision_v2,
    "torchvision, one window": lambda: torchvision_v1(window=(8, 16)),
    "bundled": bundled_v1,
    "bundled, rolled before": lambda: bundled_v1(pad_first=False),
    "bundled v2": bundled_v2,
    "hugging face": lambda: hf_v1(image_size=(60, 40)),
    "hugging face v2": lambda: hf_v2(image_size=(60, 40)),
    "hugging face, no bias": lambda: hf_v1(image_size=(60, 40), qkv_bias=False),
}


@pytest.mark.parametrize("name", PADDED)
def test_maps_that_the_windows_do_not_fill(name):
    torch.manual_seed(0)
    agree(PADDED[name](), images(None, size=(60, 40)), ops=OP)


@pytest.mark.parametrize("family", [timm_v1, timm_v2], ids=lambda f: f.__name__)
def test_after_set_input_size(family):
    """The table is another Parameter then, windows and mask are others: all is read at each call."""
    torch.manual_seed(0)
    plain = family().eval()
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    for m in (model, plain):
        m.set_input_size((60, 84), window_size=5)
        randomise_(m)
    x = images(None, size=(60, 84))
    assert_agree(step(model, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()))
    assert not any(s.fallbacks for s in fastconv.report(model).sites)


class OfMaps(nn.Module):
    """A block of Hugging Face as one of maps (B, H, W, C)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(1, 2), tuple(x.shape[1:3]))[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda: swin_transformer_v2.SwinTransformerV2Block(32, (8, 12), 8, window_size=4, shift_size=2),
        lambda: OfMaps(Swinv2Layer(Swinv2Config(window_size=4), 32, (8, 12), 8, shift_size=2)),
        lambda: tv_swin.ShiftedWindowAttentionV2(32, [4, 4], [2, 2], 8),
    ],
    ids=("timm", "hugging face", "torchvision"),
)
def test_logit_scales_at_their_limit(build):
    """Cosines times 100, of 4 channels a head, lie as far apart as the mask of -100 moves them: it must be added, and twice where
    the original adds it twice."""
    torch.manual_seed(0)
    plain = randomise_(build())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith("logit_scale"):
                p.copy_(torch.linspace(4.4, 5, 8).view(p.shape))  # the limit is 4.605
    model = copy.deepcopy(plain)
    assert fastconv.patch(model, ops=OP).blocks == (1, 1)
    x = torch.randn(2, 8, 12, 32)
    assert_agree(step(model, x), step(plain, x))


def capture_graphs(model, x):
    """(names, shapes) of what is computed in the ATen graphs, forward and backward, of a training step."""
    names, shapes = [], []

    def capture(graph, _):
        for node in graph.graph.nodes:
            names.append(str(node.target))
            values = node.meta.get("val")
            shapes.extend(
                tuple(v.shape) for v in (values if isinstance(values, (tuple, list)) else (values,)) if isinstance(v, torch.Tensor)
            )
        return graph.forward

    torch._dynamo.reset()
    step(model, x, torch.compile(model, backend=aot_autograd(fw_compiler=capture, bw_compiler=capture), fullgraph=True))
    torch._dynamo.reset()
    return names, shapes


MOVES = {f"aten.{name}." for name in ("roll", "masked_fill", "bmm", "_softmax", "_safe_softmax", "index_put")}
# One stage, so that nothing but attention pads, with more scores than channels: 64 tokens a window and 16 channels a head.
ONE_STAGE = dict(embed_dim=64, depths=(2,), num_heads=(4,), window_size=8)
LARGE_WINDOWS = {
    timm_v1: lambda: timm_v1(img_size=(60, 64), **ONE_STAGE),
    timm_v2: lambda: timm_v2(img_size=(60, 64), **ONE_STAGE),
    torchvision_v1: lambda: tv_swin.SwinTransformer([4, 4], 64, [2], [4], [8, 8], num_classes=5),
    torchvision_v2: lambda: tv_swin.SwinTransformer([4, 4], 64, [2], [4], [8, 8], num_classes=5, block=tv_swin.SwinTransformerBlockV2),
    bundled_v1: lambda: swin.SwinTransformer(**ONE_STAGE, img_size=64, num_classes=5),
    bundled_v2: lambda: swin_v2.SwinTransformerV2(**ONE_STAGE, img_size=64, num_classes=5),
    hf_v1: lambda: hf_v1(image_size=(60, 64), mlp_ratio=2.0, **ONE_STAGE),
    hf_v2: lambda: hf_v2(image_size=(60, 64), mlp_ratio=2.0, **ONE_STAGE),
    official_v1: lambda: official_v1(image=(64, 64), dim=64, heads=4, window=8),
    official_v2: lambda: official_v2(image=(64, 64), dim=64, heads=4, window=8),
}


@pytest.mark.parametrize("family", [f if f is timm_v1 else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_nothing_is_rolled_cut_or_masked(family):
    """Neither in forward nor in backward; nor is there a tensor of the size of all scores, or a padded map."""
    torch.manual_seed(0)
    plain = without_mlp(LARGE_WINDOWS[family]())
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops=OP)
    blocks = len(fast_blocks(model))
    assert blocks >= 2
    pads = family not in (official_v1, official_v2)
    x = images(family, size=(60, 64) if pads else (64, 64))
    scores = 2 * 4 * 16 * 16 * 64  # images, heads, pixels, pixels of a window
    padded = (2, 16, 16, 64)
    names, shapes = capture_graphs(plain, x)
    found = {m for m in MOVES if any(n.startswith(m) for n in names)}
    assert {"aten.roll.", "aten.bmm."} <= found and found & {"aten._softmax.", "aten._safe_softmax."}
    assert max(map(math.prod, shapes)) >= scores and padded in shapes
    names, shapes = capture_graphs(model, x)
    assert not {m for m in MOVES if any(n.startswith(m) for n in names)}
    assert not [s for s in shapes if len(s) > 6], "cut into windows"
    assert sum("window_attention_fwd" in n for n in names) == sum("window_attention_bwd" in n for n in names) == blocks
    assert max(map(math.prod, shapes)) < scores and not (pads and padded in shapes)


def bars(img_size, batch, **kw):
    torch.manual_seed(0)
    plain = swin_transformer.SwinTransformer(img_size=img_size, num_classes=5, **kw)
    attention, everything = copy.deepcopy(plain), copy.deepcopy(plain)
    fastconv.patch(attention, ops=OP)
    fastconv.patch(everything)
    x = torch.randn(batch, 3, img_size, img_size)
    before = saved_bytes(plain, x)
    return saved_bytes(attention, x) / before, saved_bytes(everything, x) / before


def test_saved_activations():
    """The first stage of swin_tiny: a value of each kind has the same share in the others. Large enough for gelu_linear."""
    attention, everything = bars(112, 4, depths=(2,), num_heads=(3,))
    assert attention <= 0.92 and everything <= 0.80, (attention, everything)


@pytest.mark.slow
def test_saved_activations_of_swin_tiny():
    attention, everything = bars(224, 2, depths=(2, 2, 6, 2))
    assert attention <= 0.92 and everything <= 0.80, (attention, everything)
