"""The bundled architectures against published counts, timm, torchvision and the checkpoints' keys; create_model and list_models."""

import ast
import copy
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from model_helpers import build_meta, check_counts, check_same_logits, randomize, shapes
from timm.models.convnext import checkpoint_filter_fn

import fastconv
from fastconv.models import MODELS, convnext

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "convnext_tiny": (28_589_128, 4_455_531_264),
    "convnext_small": (50_223_688, 8_683_712_256),
    "convnext_base": (88_591_464, 15_354_729_472),
    "convnext_large": (197_767_336, 34_361_433_600),
    "convnext_xlarge": (350_196_968, 60_921_030_656),
    "convnext_isotropic_small": (22_308_712, 4_286_367_744),
    "convnext_isotropic_base": (87_083_752, 16_896_331_776),
    "convnext_isotropic_large": (305_942_504, 59_699_224_576),
}
HIERARCHICAL = [name for name in COUNTS if "isotropic" not in name]


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_counts(name, *COUNTS[name])


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_every_key_and_shape_maps_onto_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert shapes(checkpoint_filter_fn(build_meta(name).state_dict(), theirs)) == shapes(theirs.state_dict())


def test_checkpoint_keys():
    """The names in the published checkpoints."""
    keys = set(build_meta("convnext_tiny").state_dict())
    block = {f"{part}.{kind}" for part in ("dwconv", "norm", "pwconv1", "pwconv2") for kind in ("weight", "bias")} | {"gamma"}
    expected = {f"stages.{i}.{j}.{key}" for i, depth in enumerate((3, 3, 9, 3)) for j in range(depth) for key in block}
    expected |= {f"downsample_layers.{i}.{j}.{kind}" for i in range(4) for j in range(2) for kind in ("weight", "bias")}
    expected |= {f"{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}
    assert keys == expected
    for name, depth, gamma in (("small", 18, False), ("base", 18, False), ("large", 36, True)):
        keys = set(build_meta(f"convnext_isotropic_{name}").state_dict())
        expected = {f"blocks.{j}.{key}" for j in range(depth) for key in (block if gamma else block - {"gamma"})}
        assert keys == expected | {f"{part}.{kind}" for part in ("stem", "norm", "head") for kind in ("weight", "bias")}


def to_torchvision(state):
    """Our parameters under torchvision's names; convnext_tiny only."""
    parts = {"dwconv": "block.0", "norm": "block.2", "pwconv1": "block.3", "pwconv2": "block.5", "gamma": "layer_scale"}
    renamed = {}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part == "downsample_layers":
            stage, layer, kind = rest
            key = f"features.{2 * int(stage)}.{layer}.{kind}"
        elif part == "stages":
            stage, block, inner, *kind = rest
            key = ".".join([f"features.{2 * int(stage) + 1}.{block}", parts[inner], *kind])
            value = value[:, None, None] if inner == "gamma" else value
        else:
            key = f"classifier.{ {'norm': 0, 'head': 2}[part] }.{rest[0]}"
        renamed[key] = value
    return renamed


@pytest.fixture(scope="module")
def randomized_tiny():
    return randomize(convnext.convnext_tiny(num_classes=10)).eval()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_numerical_parity(library, randomized_tiny):
    ours = randomized_tiny
    if library == "timm":
        theirs = timm.create_model("convnext_tiny", num_classes=10)
        theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs))
    else:
        theirs = torchvision.models.convnext_tiny(num_classes=10)
        theirs.load_state_dict(to_torchvision(ours.state_dict()))
    theirs.eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    check_same_logits(ours, theirs, images)
    with torch.inference_mode():
        expected = theirs(images)
        mirrored = copy.deepcopy(ours)
        mirrored.stages[1][1].dwconv.weight.copy_(ours.stages[1][1].dwconv.weight.flip(-1))
        assert torch.linalg.norm(mirrored(images) - expected) > 1e-3 * torch.linalg.norm(expected)  # one block's taps are seen


def test_isotropic_is_its_formula():
    """Stem, blocks without resolution change, pool, norm, head: each written out again from the paper."""
    model = randomize(convnext.ConvNeXtIsotropic(2, 16, num_classes=5)).eval().double()
    images = torch.randn(2, 3, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        x = model.stem(images)
        assert x.shape == (2, 16, 3, 4)
        for block in model.blocks:
            assert block.gamma is None
            y = block.dwconv(x).movedim(1, -1)
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * block.norm.weight + block.norm.bias
            y = y @ block.pwconv1.weight.T + block.pwconv1.bias
            y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
            x = x + (y @ block.pwconv2.weight.T + block.pwconv2.bias).movedim(-1, 1)
        features = model.norm(x.mean((2, 3)))
        torch.testing.assert_close(model.forward_features(images), features)
        torch.testing.assert_close(model(images), model.head(features))


def small(**kw):
    return convnext.ConvNeXt((1, 1, 2, 1), (8, 16, 24, 32), num_classes=5, layer_scale_init_value=0.5, **kw)


def test_memory_formats_agree_and_are_kept():
    model = randomize(small()).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        outputs = []
        hook = model.stages[2].register_forward_hook(lambda *args: outputs.append(args[2]))
        got = model(images.contiguous(memory_format=torch.channels_last))
        hook.remove()
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_channels_classes_and_initialisation():
    torch.manual_seed(0)
    model = convnext.convnext_isotropic_small(in_chans=1, num_classes=7, head_init_scale=0.001, drop_path_rate=0.3)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    weight = model.blocks[0].pwconv1.weight
    assert abs(weight.std().item() - 0.02) < 1e-3 and weight.abs().max() <= 2.0
    assert abs(model.head.weight.std().item() - 2e-5) < 2e-6
    assert not any(model.blocks[3].dwconv.bias)
    assert isinstance(model.blocks[0].drop_path, torch.nn.Identity)
    rates = [block.drop_path.drop_prob for block in model.blocks[1:]]
    assert rates == pytest.approx([0.3 * i / 17 for i in range(1, 18)])
    assert torch.equal(small().stages[0][0].gamma, torch.full((8,), 0.5))
    assert torch.equal(convnext.Block(4).gamma, torch.full((4,), 1e-6))
    assert convnext.Block(4, layer_scale_init_value=0).gamma is None


def test_drop_path_draws_one_value_an_image():
    drop = convnext.DropPath(0.25).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 3, 2, 2))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    dropped = (out[:, 0, 0, 0] == 0).double().mean().item()
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(drop.eval()(out), out)
    for prob in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\)"):
            convnext.DropPath(prob)


def test_training_is_random_and_eval_is_not():
    model = small(drop_path_rate=0.5)
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_models_import_nothing_of_fastconv():
    """Each family's file runs alone, so that it can be read and copied alone; a pretraining imports its family."""
    for path in Path(convnext.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "fastconv" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "fastconv", path
                assert node.level == 0 or path.name == "__init__.py" or (path.name, node.module) == ("fcmae.py", "convnextv2"), path
    spec = importlib.util.spec_from_file_location("standalone_convnext", convnext.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ConvNeXtIsotropic(1, 8, num_classes=2)(torch.zeros(1, 3, 16, 16)).shape == (1, 2)


QUICK = ("convnext_tiny", "convnext_isotropic_small")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_every_supported_site_is_fused(name):
    with torch.device("meta"):
        model = fastconv.create_model(name)
    report = fastconv.report(model)
    blocks = sum(isinstance(m, convnext.Block) for m in model.modules())
    assert blocks > 0 and report.blocks == (blocks, blocks)
    assert not report.declined
    scaled = sum(isinstance(m, convnext.Block) and m.gamma is not None for m in model.modules())
    # without layer scale the tail is a plain sum
    expected = {"depthwise_conv_norm": blocks, "residual_scale": scaled, "gelu_linear": blocks}
    assert Counter(site.op for site in report.fused) == Counter(expected)
    assert MODELS[name].ops == tuple(op for op, sites in expected.items() if sites)
    assert shapes(model.state_dict()) == shapes(build_meta(name).state_dict())


def test_fused_model_computes_the_same():
    plain = randomize(small())
    fused = small()
    fused.load_state_dict(plain.state_dict())
    assert fastconv.patch(fused).blocks == (5, 5)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected, got = plain(images), fused(images)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    for loss in (expected.square().sum(), got.square().sum()):
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters()):
        assert torch.linalg.norm(b.grad - a.grad) <= 1e-4 * torch.linalg.norm(a.grad), name


@pytest.mark.parametrize(
    "name, blocks", [("timm:convnext_atto", 12), ("torchvision:convnext_tiny", 18), ("hf:convnext", 18), ("hf:ConvNextConfig", 18)]
)
def test_other_libraries_by_prefix(name, blocks):
    model = fastconv.create_model(name, num_classes=3)
    assert fastconv.report(model).blocks == (blocks, blocks)
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert weights[-1].shape[0] == 3
    assert not fastconv.report(fastconv.create_model(name, fused=False, num_classes=3)).fused


def test_list_models():
    assert fastconv.list_models() == list(MODELS)
    assert fastconv.list_models("convnext_iso*") == [f"convnext_isotropic_{size}" for size in ("small", "base", "large")]
    assert fastconv.list_models("nothing*") == []
    assert "timm:convnext_tiny" in fastconv.list_models("timm:convnext*")
    assert fastconv.list_models("torchvision:convnext_*") == [f"torchvision:convnext_{size}" for size in ("base", "large", "small", "tiny")]
    assert {"hf:convnext", "hf:ConvNextConfig"} <= set(fastconv.list_models("hf:*onv*ext*"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("convnext_tniy", r"unknown model 'convnext_tniy'; did you mean convnext_tiny"),
        ("timm:convnext_tinny", r"unknown model 'timm:convnext_tinny'; did you mean timm:convnext_tiny"),
        ("torchvision:convnet_tiny", r"did you mean torchvision:convnext_tiny"),
        ("hf:convnxt", r"did you mean hf:convnext"),
        ("keras:convnext_tiny", r"unknown prefix 'keras' .*timm:, torchvision:, hf:"),
        ("zzz", r"unknown model 'zzz'.*list_models"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        fastconv.create_model(name)


def test_missing_library_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'timm:convnext_tiny' needs timm.*pip install timm"):
        fastconv.create_model("timm:convnext_tiny")
