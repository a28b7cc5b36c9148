"""patch on squeeze-and-excitation: the contract for one model of each library, and what is fused where."""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from gate_models import Stack
from patch_contract import PatchContract, SingleProcessContract, assert_agree, randomise_, step
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

import fastconv

OP = "squeeze_excite"


class GateContract:
    ops = compiled_ops = (OP,)
    parts = ("fc1", "fc2")


HardSigmoid = timm.layers.activations.HardSigmoid  # torch's rounds its derivative to float32, in float64 too


class TestEfficientNet(GateContract, PatchContract):
    blocks = 2

    def make(self, drop_path=0.0):
        kind = timm.models._efficientnet_blocks.SqueezeExcite
        return Stack((kind(12, act_layer=nn.SiLU), kind(12, 0.5, act_layer="hard_swish", gate_layer=HardSigmoid)), 12, drop_path)


class TestSEModule(GateContract, SingleProcessContract):
    blocks = 2

    def make(self, drop_path=0.0):
        return Stack((timm.layers.SEModule(12, rd_channels=5), timm.layers.SEModule(12, rd_channels=1, act_layer=nn.GELU)), 12, drop_path)


class TestTorchvision(GateContract, SingleProcessContract):
    blocks = 2

    def make(self, drop_path=0.0):
        gates = SqueezeExcitation(12, 5, nn.SiLU), SqueezeExcitation(12, 4, scale_activation=HardSigmoid)
        return Stack(gates, 12, drop_path)


class TestHuggingFace(GateContract, SingleProcessContract):
    blocks = 1

    def make(self, drop_path=0.0):
        return Stack([transformers.models.regnet.modeling_regnet.RegNetSELayer(12, 5)], 12, drop_path)


def fused(model) -> tuple[int, set[str]]:
    """Gates that are fused, and the reasons of those that are not."""
    sites = [s for s in fastconv.patch(model, ops=OP).sites if s.op == OP]
    return sum(s.status == "fused" for s in sites), {s.reason for s in sites if s.status == "declined"}


TIMM = {
    "efficientnet_b0": 16,
    "tf_efficientnet_b0": 16,
    "efficientnetv2_s": 30,
    "mobilenetv3_large_100": 8,
    "regnety_032": 21,
    "seresnet50": 16,
    "senet154": 50,
    "legacy_senet154": 50,
    "resnetrs50": 16,
    "nfnet_f0": 12,
    "tresnet_m": 18,
    "hgnet_tiny": 5,
    "ese_vovnet19b_dw": 4,
    "rdnet_tiny": 15,
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert fused(model) == (TIMM[name], set())


def test_a_norm_between_the_layers_is_declined():
    with torch.device("meta"):
        model = timm.create_model("rexnet_100")
    assert fused(model) == (0, {"bn is a BatchNorm2d, between its layers"})
    assert not any(isinstance(m, fastconv.patching.FastModule) for m in model.modules())


@pytest.mark.parametrize("name, count", (("efficientnet_b0", 16), ("mobilenet_v3_large", 8), ("regnet_y_400mf", 16)))
def test_models_of_torchvision(name, count):
    assert fused(getattr(torchvision.models, name)()) == (count, set())


def test_models_of_hugging_face():
    regnet = transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], groups_width=8, layer_type="y")
    assert fused(transformers.RegNetModel(regnet)) == (5, set())
    with torch.device("meta"):
        model = transformers.EfficientNetModel(transformers.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3))
    count, reasons = fused(model)
    assert count == sum(type(m).__name__ == "EfficientNetSqueezeExciteLayer" for m in model.modules()) >= 7
    assert not reasons


class Squared(timm.layers.SEModule):
    def forward(self, x):
        return super().forward(x) ** 2


class Logged(timm.layers.SEModule):
    def forward(self, x):
        self.seen = self.act(x)
        return super().forward(x)


@pytest.mark.parametrize(
    "gate, reason",
    (
        (timm.layers.SEModule(8, add_maxpool=True), "what it squeezes is not the mean over the map"),
        (timm.layers.EffectiveSEModule(8, add_maxpool=True), "what it squeezes is not the mean over the map"),
        (timm.layers.SEModule(8, act_layer=nn.Tanh), "its activation is Tanh()"),
        (timm.layers.SEModule(8, act_layer=timm.layers.GELUTanh), "its activation is GELUTanh()"),
        (timm.layers.SEModule(8, gate_layer="tanh"), "its gate is Tanh()"),
        (timm.layers.SEModule(8, norm_layer=nn.BatchNorm2d), "bn is a BatchNorm2d, between its layers"),
        (SqueezeExcitation(8, 4, lambda: nn.LeakyReLU(0.2)), "its activation is LeakyReLU(negative_slope=0.2)"),
        (Squared(8), "its result is not its input times a gate"),
        (Logged(8), "its forward computes more than a gate from the means of its input"),
    ),
    ids=str,
)
def test_other_forms_are_declined(gate, reason):
    plain = randomise_(gate)
    model = copy.deepcopy(plain)
    assert fused(model) == (0, {reason})
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(model(x), plain(x))


def test_a_layer_of_another_class_is_declined():
    gate = timm.layers.SEModule(8)
    gate.fc1 = nn.Sequential(gate.fc1)
    assert fused(gate) == (0, {"fc1 is a Sequential, not a Conv2d"})
    gate = timm.layers.SEModule(8)
    gate.fc2 = nn.Conv2d(8, 8, 1, groups=2)
    assert fused(gate) == (0, {"fc2 is not a plain 1x1 convolution"})
    gate.fc2 = nn.Conv2d(8, 1, 1)
    assert fused(gate) == (0, {"its gate has not one value for each channel"})


@pytest.mark.parametrize(
    "make",
    (
        lambda: timm.layers.EffectiveSEModule(8),
        lambda: timm.models.hgnet.EseModule(8),
        lambda: timm.models.senet.SEModule(8, 4),
        lambda: timm.layers.SEModule(8, act_layer=nn.GELU, bias=False),
        lambda: timm.layers.SEModule(8, act_layer=nn.LeakyReLU, gate_layer=HardSigmoid),
        lambda: timm.layers.SEModule(8, act_layer=timm.layers.activations.HardSwish),
        lambda: transformers.models.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer(
            transformers.EfficientNetConfig(), 8, 12, expand=True
        ),
    ),
    ids=("effective", "hgnet", "senet", "gelu, no bias", "leaky_relu, hardsigmoid", "hardswish", "hugging face"),
)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_every_form_agrees(make, memory_format):
    torch.manual_seed(0)
    plain = randomise_(make())
    model = copy.deepcopy(plain)
    assert fused(model) == (1, set())
    channels = next(plain.parameters()).shape[1]
    x = torch.randn(3, channels, 5, 4).to(memory_format=memory_format)
    assert_agree(step(model, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()))
    assert model(x).stride() == plain(x).stride()
    assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}


@pytest.mark.parametrize("name", ("timm:mobilenetv3_small_050", "mobilenetv3_small_100"))
def test_a_whole_model_agrees(name):
    torch.manual_seed(0)
    plain = fastconv.create_model(name, fused=False, num_classes=5).eval()
    model = copy.deepcopy(plain)
    assert fused(model) == (9, set())
    x = torch.randn(2, 3, 64, 40)
    with torch.no_grad():
        a, b = model(x), plain(x)
    assert (a - b).norm() <= 1e-5 * b.norm()


def test_inputs_that_fall_back():
    """Counted, and the original code's result or error."""
    gate = timm.layers.SEModule(8)
    plain = copy.deepcopy(gate)
    fastconv.patch(gate)
    with pytest.warns(RuntimeWarning, match="input and layers have different dtypes"), pytest.raises(RuntimeError):
        gate(torch.zeros(1, 8, 2, 2, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="the input of fc1 does not have its channels"), pytest.raises(RuntimeError):
        gate(torch.zeros(1, 4, 2, 2))
    x, kept = torch.randn(1, 8, 3, 2), dict(gate.fc1.named_parameters())
    for bias, reason in (
        (torch.zeros(3), "the bias of fc1 does not have its channels"),
        (kept["bias"].double(), "weight and bias of fc1 have different dtypes"),
    ):
        gate.fc1.bias = nn.Parameter(bias)
        with pytest.warns(RuntimeWarning, match=reason), pytest.raises(RuntimeError):
            gate(x)
    gate.fc1.bias = kept["bias"]
    fc2, gate.fc2.weight = gate.fc2.weight, nn.Parameter(torch.zeros(4, 8, 1, 1))
    with pytest.warns(RuntimeWarning, match="the bias of fc2 does not have its channels"), pytest.raises(RuntimeError):
        gate(x)
    gate.fc2.weight = fc2
    (site,) = fastconv.report(gate).sites
    assert sum(site.fallbacks.values()) == 5 and site.backend == "eager"
    assert torch.allclose(gate(x), plain(x)) and site.backend == "cpu"


def test_layers_that_were_narrowed_are_fused():
    """As pruning leaves them: their parameters count, whatever the modules say of themselves."""
    gate = timm.layers.SEModule(8, rd_channels=4)
    gate.fc1.weight, gate.fc1.bias = nn.Parameter(gate.fc1.weight[:3]), nn.Parameter(gate.fc1.bias[:3])
    gate.fc2.weight = nn.Parameter(gate.fc2.weight[:, :3])
    plain = copy.deepcopy(gate)
    assert fused(gate) == (1, set())
    x = torch.randn(2, 8, 3, 2)
    assert_agree(step(gate, x), step(plain, x), step(copy.deepcopy(plain).double(), x.double()))
    assert [s.backend for s in fastconv.report(gate).sites] == ["cpu"]


def test_small_maps_run_the_original_code(monkeypatch):
    gate = timm.layers.SEModule(8)
    plain = copy.deepcopy(gate)
    fastconv.patch(gate)
    monkeypatch.setitem(fastconv.ops._registry.MIN_CPU_ELEMENTS, OP, 100)
    x = torch.randn(1, 8, 3, 2)
    assert torch.equal(gate(x), plain(x))
    assert [s.backend for s in fastconv.report(gate).sites] == ["native"]
