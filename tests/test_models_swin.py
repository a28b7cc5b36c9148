"""Swin V1 and V2 against published counts, timm, torchvision and the official checkpoints' keys."""

import pytest
import timm
import torch
from model_helpers import build_meta, check_counts, check_same_logits, randomize, shapes
from timm.models import swin_transformer, swin_transformer_v2
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import swin_transformer as peer

from fastconv.models import MODELS, swin, swin_v2

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image
COUNTS = {
    "swin_tiny_patch4_window7_224": (28_288_354, 4_490_566_656),
    "swin_small_patch4_window7_224": (49_606_258, 8_740_875_264),
    "swin_base_patch4_window7_224": (87_768_224, 15_430_946_816),
    "swin_large_patch4_window7_224": (196_532_476, 34_475_759_616),
    "swinv2_tiny_window8_256": (28_347_154, 5_939_690_496),
    "swinv2_small_window8_256": (49_728_418, 11_545_857_024),
    "swinv2_base_window8_256": (87_918_816, 20_325_134_336),
    "swinv2_large_window12_192": (196_739_932, 26_101_905_408),
}
V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
FILTERS = {"swin": swin_transformer.checkpoint_filter_fn, "swin_v2": swin_transformer_v2.checkpoint_filter_fn}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_counts(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_every_key_and_shape_maps_onto_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    state = FILTERS[MODELS[name].module](build_meta(name).state_dict(), theirs)
    assert shapes(state) == shapes(theirs.state_dict())


def slide_row(model, size):
    """(parameters in millions, GFLOPs to one decimal), as the lecture's tables print them."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.eval()(torch.empty(1, 3, size, size))
    return round(sum(p.numel() for p in model.parameters()) / 1e6), round(counter.get_total_flops() / 2e9, 1)


@pytest.mark.parametrize(
    "name, kw, row",
    [
        (V1, {}, (28, 4.5)),
        ("swin_small_patch4_window7_224", {}, (50, 8.7)),
        ("swin_base_patch4_window7_224", {}, (88, 15.4)),
        ("swin_base_patch4_window7_224", {"img_size": 384, "window_size": 12}, (88, 47.1)),
        ("swin_large_patch4_window7_224", {}, (197, 34.5)),
        ("swin_large_patch4_window7_224", {"img_size": 384, "window_size": 12}, (197, 103.9)),
    ],
)
def test_the_lectures_rows(name, kw, row):
    """Swin in the ConvNeXt paper's result tables, and Swin-T (28.3 M parameters) in its table 9."""
    model = build_meta(name, **kw)
    assert slide_row(model, kw.get("img_size", 224)) == row
    if name == V1:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 28.3


@pytest.mark.parametrize("name", [V1, V2])
def test_official_checkpoints_load(name):
    """Their buffers come with them: index and mask of every shifted block, and V2's coordinates; another key is refused."""
    model = build_meta(name)
    state, block = model.state_dict(), "layers.0.blocks.1."
    table = {"relative_position_bias_table"} if name == V1 else {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"}
    table |= {"qkv.weight", "proj.weight", "proj.bias"} | ({"qkv.bias"} if name == V1 else {"q_bias", "v_bias"})
    keys = {f"attn.{key}" for key in table}
    keys |= {f"{part}.{kind}" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")}
    assert {key.removeprefix(block) for key in state if key.startswith(block)} == keys
    assert {key for key in state if not key.startswith("layers.")} == {
        f"{part}.{kind}" for part in ("patch_embed.proj", "patch_embed.norm", "norm", "head") for kind in ("weight", "bias")
    }
    assert {key.removeprefix("layers.2.") for key in state if key.startswith("layers.2.down")} == {
        "downsample.reduction.weight",
        "downsample.norm.weight",
        "downsample.norm.bias",
    }
    with torch.device("meta"):
        state[block + "attn_mask"] = torch.empty(64, 49, 49)
        state[block + "attn.relative_position_index"] = torch.empty(49, 49, dtype=torch.long)
        if name == V2:
            state[block + "attn.relative_coords_table"] = torch.empty(1, 15, 15, 2)
    count = len(state)
    model.load_state_dict(state)
    assert len(state) == count
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict(state | {block + "mask": state[block + "attn_mask"]})


def to_torchvision(state, theirs):
    """Our parameters under torchvision's names."""
    renamed = {key: value for key, value in theirs.state_dict().items() if "relative_position_index" in key or "coords_table" in key}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part == "patch_embed":
            key = f"features.0.{ {'proj': 0, 'norm': 2}[rest[0]] }.{rest[1]}"
        elif part == "layers" and rest[1] == "downsample":
            key = f"features.{2 * int(rest[0]) + 2}." + ".".join(rest[2:])
        elif part == "layers":
            key = f"features.{2 * int(rest[0]) + 1}." + ".".join(rest[2:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            key = key.replace("q_bias", "qkv.bias")
            value = torch.cat([value, torch.zeros_like(value), state[".".join([part, *rest[:-1], "v_bias"])]])
        renamed[key] = value
    return renamed


def images(*size):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [V1, V2])
def test_parity_with_torchvision(name):
    """Half the channels. Maps that do not fill their windows, padded, then rolled; maps smaller than a window; cropped images."""
    ours = randomize((swin.SwinTransformer if name == V1 else swin_v2.SwinTransformerV2)(48, num_classes=10)).eval()
    window = [7, 7] if name == V1 else [8, 8]
    kw = {} if name == V1 else {"block": peer.SwinTransformerBlockV2, "downsample_layer": peer.PatchMergingV2}
    theirs = peer.SwinTransformer([4, 4], 48, [2, 2, 6, 2], [3, 6, 12, 24], window, num_classes=10, **kw)
    theirs.load_state_dict(to_torchvision(ours.state_dict(), theirs))
    x = images(62, 150)
    check_same_logits(ours, theirs, x)
    attn = ours.layers[0].blocks[1].attn
    with torch.inference_mode():
        expected = theirs(x)
        attn.shift_size = 0
        assert torch.linalg.norm(ours(x) - expected) > 1e-4 * torch.linalg.norm(expected)
        attn.shift_size = window[0] // 2
        attn.qkv.weight.copy_(attn.qkv.weight.flip(0))
        assert torch.linalg.norm(ours(x) - expected) > 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize(
    "name, size, pad_first", [(V1, (112, 112), True), (V1, (100, 116), False), (V2, (128, 128), True), (V2, (120, 116), False)]
)
def test_parity_with_timm(name, size, pad_first):
    """Half the channels. Maps that fill their windows, and ones that do not: rolled, then padded; the last windows are smaller."""
    build = swin.SwinTransformer if name == V1 else swin_v2.SwinTransformerV2
    model = randomize(build(48, img_size=max(size), num_classes=10, pad_first=pad_first)).eval()
    theirs = timm.create_model(name, embed_dim=48, num_classes=10, img_size=size)
    theirs.load_state_dict(FILTERS[MODELS[name].module](model.state_dict(), theirs))
    x = images(*size)
    check_same_logits(model, theirs, x)
    with torch.inference_mode():
        expected = model(x)
        for module in model.modules():
            if hasattr(module, "pad_first"):
                module.pad_first = not pad_first
        change = torch.linalg.norm(model(x) - expected) / torch.linalg.norm(expected)
    assert (change < 1e-6) if pad_first else (change > 1e-4)  # where something is padded, the order is seen


@pytest.mark.slow
@pytest.mark.parametrize("name", [V1, V2])
def test_parity_at_the_native_size(name):
    """The whole smallest model, with both peers."""
    ours, size = randomize(MODELS[name].build(num_classes=10)).eval(), MODELS[name].resolution
    theirs = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(FILTERS[MODELS[name].module](ours.state_dict(), theirs))
    check_same_logits(ours, theirs, images(size, size))
    theirs = (peer.swin_t if name == V1 else peer.swin_v2_t)(num_classes=10)
    theirs.load_state_dict(to_torchvision(ours.state_dict(), theirs))
    check_same_logits(ours, theirs, images(size, size))


def test_windows_follow_the_image_size():
    """A stage whose map at the native size is not larger than the window is one unshifted window, as in the official code."""
    last = build_meta("swinv2_large_window12_192").layers[3].blocks[1].attn
    assert (last.window_size, last.shift_size) == (6, 0)
    with torch.device("meta"):
        model = swin.swin_tiny_patch4_window7_224(img_size=112)
    assert [layer.blocks[1].attn.window_size for layer in model.layers] == [7, 7, 7, 4]
    assert [layer.blocks[1].attn.shift_size for layer in model.layers] == [3, 3, 0, 0]
    assert [layer.blocks[0].attn.shift_size for layer in model.layers] == [0, 0, 0, 0]
    assert model.layers[3].blocks[0].attn.relative_position_bias_table.shape == (49, 24)


@pytest.mark.parametrize("module", [swin, swin_v2])
def test_one_step_reaches_every_parameter(module):
    build = {swin: swin.SwinTransformer, swin_v2: swin_v2.SwinTransformerV2}[module]
    torch.manual_seed(0)
    model = randomize(build(8, (2, 2), (2, 4), window_size=4, img_size=64, num_classes=5, drop_path_rate=0.1)).train()
    x = torch.randn(4, 3, 40, 52)
    loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0, name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    model.eval()
    assert torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])) != loss


def test_initialisation():
    """Swin V2's blocks start as the identity, Swin's do not; the tables start small."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 16)
    model = swin_v2.SwinTransformerV2(16, (1,), (2,), window_size=4, img_size=32)
    assert torch.equal(model.layers[0].blocks[0](x), x)
    model = swin.SwinTransformer(16, (1,), (2,), window_size=4, img_size=32)
    assert not torch.equal(model.layers[0].blocks[0](x), x)
    assert 0.01 < model.layers[0].blocks[0].attn.relative_position_bias_table.std() < 0.03


def test_logit_scale_is_clamped():
    attn = swin_v2.WindowAttention(8, 4, 2).double()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for scale in (4.0, torch.log(torch.tensor(100.0)).item(), 9.0):
        torch.nn.init.constant_(attn.logit_scale, scale)
        outputs.append(attn(x))
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-6, atol=0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4 * outputs[1].abs().max()
