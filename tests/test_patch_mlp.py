"""MLPs of transformers, on maps and on tokens: the contract of patch, and which are fused where."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from patch_contract import SingleProcessContract
from patch_helpers import assert_agree, fast_blocks, part, randomise_, step
from test_patch_memory import saved_bytes
from timm.layers import GlobalResponseNormMlp, GluMlp, Mlp
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops.misc import MLP

import fastconv
from fastconv.models import vit

pytestmark = pytest.mark.usefixtures("one_thread")
OP = "gelu_linear"


class Stack(nn.Module):
    """A stem, then blocks x + drop_path(mlp(norm(x))) on maps (N, H, W, C), or on tokens (N, L, C)."""

    def __init__(self, mlps, channels, drop_path=0.0, tokens=True):
        super().__init__()
        self.tokens = tokens
        self.stem = nn.Conv2d(3, channels, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in mlps)
        self.mlps = nn.ModuleList(mlps)
        self.drop_path = timm.layers.DropPath(drop_path)

    def forward(self, x):
        x = self.stem(x)
        x = x.flatten(2).mT if self.tokens else x.permute(0, 2, 3, 1)
        for norm, mlp in zip(self.norms, self.mlps):
            x = x + self.drop_path(mlp(norm(x)))
        return x


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class MlpContract(SingleProcessContract):
    blocks = 2
    ops = (OP,)
    compiled_ops = ()  # under torch.compile the op is PyTorch's own operators
    parts = ("fc1", "fc2")

    def saved_class(self):
        return Mlp

    @pytest.mark.parametrize("name", ["act", "fc2"])
    def test_hooks_on_inner_modules_are_declined(self, name):
        model, plain = self.pair()
        fired = []
        handle = part(fast_blocks(model)[0], name).register_forward_hook(lambda *_: fired.append(1))
        with pytest.warns(RuntimeWarning, match=f"a hook sits on {name}"):
            actual = step(model, self.images())
        assert fired == [1]
        assert_agree(actual, step(plain, self.images()))
        assert [sum(s.fallbacks.values()) for s in fastconv.report(model).sites if s.op == OP] == [1, 0]
        handle.remove()
        step(model, self.images())
        assert fired == [1] and {s.backend for s in fastconv.report(model).fused} == {"cpu"}

    def test_parametrized_weights(self):
        """The first layer is called as it is; the second's parametrization must be computed once, by its own forward."""
        model, plain = self.pair()
        for m in (model, plain):
            for mlp in m.mlps:
                parametrize.register_parametrization(mlp.fc1, "weight", Doubled())
        assert_agree(step(model, self.images()), step(plain, self.images()))
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}
        for m in (model, plain):
            parametrize.register_parametrization(m.mlps[1].fc2, "weight", Doubled())
        with pytest.warns(RuntimeWarning, match="the weight of fc2 is parametrized|fc2 is a Parametrized"):
            actual = step(model, self.images())
        assert_agree(actual, step(plain, self.images()))
        fastconv.unpatch(model)
        assert not fast_blocks(model)


class TestTokens(MlpContract):
    def make(self, drop_path=0.0):
        return Stack([Mlp(12, 40), Mlp(12, 24, act_layer=lambda: nn.GELU("tanh"), norm_layer=nn.Identity)], 12, drop_path)


class TestMaps(MlpContract):
    def make(self, drop_path=0.0):
        return Stack([Mlp(12, 40), Mlp(12, 24)], 12, drop_path, tokens=False)


def fused(model):
    """MLPs that are fused, and the reasons of those that are not."""
    sites = [s for s in fastconv.patch(model).sites if s.op == OP]
    return sum(s.status == "fused" for s in sites), {s.reason for s in sites if s.status == "declined"}


@pytest.mark.parametrize(
    ("build", "name", "count"),
    [
        (timm.create_model, "vit_tiny_patch16_224", 12),
        (timm.create_model, "swin_tiny_patch4_window7_224", 12),
        (timm.create_model, "swinv2_tiny_window8_256", 12),
        (timm.create_model, "mixer_s16_224", 16),
        (timm.create_model, "csatv2", 4),
        (timm.create_model, "convnext_tiny", 18),
        (torchvision.models.get_model, "swin_t", 12),
        (torchvision.models.get_model, "vit_b_16", 12),
        (fastconv.create_model, "swin_tiny_patch4_window7_224", 12),
        (fastconv.create_model, "vit_small_patch16_224", 12),
        (fastconv.create_model, "beit_base_patch16_224", 12),
    ],
)
def test_models(build, name, count):
    with torch.device("meta"):
        model = build(name)
    assert fused(model) == (count, set())


MODELS = {
    "timm swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1, 1, 1), window_size=2),
        4,
    ),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), 2),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [1, 2], [2, 2], num_classes=5),
        2,
    ),
    "bundled": (lambda: vit.VisionTransformer(24, 2, 2, img_size=64), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_each_library(name):
    build, count = MODELS[name]
    torch.manual_seed(0)
    plain = randomise_(build()).eval()
    model = copy.deepcopy(plain)
    assert fastconv.patch(model, ops=OP).blocks == (count, count)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert_agree(step(model, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()))
    assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}


def test_dropout_runs_the_original_code():
    """timm's drop sits between GELU and linear layer, with the model's own random numbers."""
    torch.manual_seed(0)
    plain = nn.Sequential(Mlp(8, 16, drop=0.5))
    model = copy.deepcopy(plain)
    count, reasons = fused(model)
    assert count == 0 and reasons == {"drop1 (Dropout) lies beside the GELU before fc2"}
    results = []
    for m in (model, plain):
        torch.manual_seed(1)
        results.append(step(m, torch.ones(2, 5, 8)))
    assert_agree(*results)


def test_what_else_is_called_so(monkeypatch):
    """A gated MLP, convolutions, another activation, and a GRN, which is fused here too."""
    assert fused(nn.Sequential(GluMlp(8, 16))) == (0, set())
    assert fused(nn.Sequential(Mlp(8, 16, use_conv=True))) == (0, set())
    assert fused(nn.Sequential(Mlp(8, 16, act_layer=nn.SiLU))) == (0, {"the activation before fc2 is no GELU: act (SiLU)"})
    assert fused(nn.Sequential(MLP(8, [16, 8], activation_layer=nn.ReLU))) == (0, {"the activation before 3 is no GELU: 1 (ReLU)"})
    monkeypatch.setattr(Mlp, "forward", lambda self, x: self.fc2(self.act(self.fc1(x))) * 2)
    assert fused(nn.Sequential(Mlp(8, 16))) == (0, {"its forward does more than call its layers one after another"})
    torch.manual_seed(0)
    plain = randomise_(nn.Sequential(GlobalResponseNormMlp(8, 16)))
    model = copy.deepcopy(plain)
    assert {(s.op, s.status) for s in fastconv.patch(model).sites if s.op != "linear"} == {("global_response_norm", "fused")}
    x = torch.randn(2, 5, 4, 8)
    assert_agree(step(model, x), step(plain, x))


def test_odd_inputs():
    plain = randomise_(nn.Sequential(Mlp(8, 16)))
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    for x in (torch.randn(0, 5, 8), torch.randn(3, 8), torch.randn(2, 3, 8).mT.contiguous().mT):
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))
    with pytest.warns(RuntimeWarning, match="fc2 gets no tensor of its shape"):
        torch.testing.assert_close(model(torch.ones(8)), plain(torch.ones(8)))


def test_one_activation_fewer_is_kept():
    plain = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    x = torch.randn(2, 3, 64, 64)
    hidden = 4 * 4 * sum(depth * 2 * (16 >> i) ** 2 * (96 << i) for i, depth in enumerate((2, 2, 6, 2)))
    assert saved_bytes(model, x) <= saved_bytes(plain, x) - hidden
