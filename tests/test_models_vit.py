"""ViT, DeiT, BEiT, EVA and MAE against published counts, timm, transformers and the checkpoints' keys."""

import inspect
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import build_meta, check_counts, check_same_logits, randomize, shapes
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from fastconv.models import MODELS, beit, coatnet, eva, mae, maxvit, mvitv2, swin, swin_v2, vit

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one image
COUNTS = {
    "vit_tiny_patch16_224": (5_717_416, 1_253_683_200),
    "vit_small_patch16_224": (22_050_664, 4_598_882_304),
    "vit_base_patch16_224": (86_567_656, 17_563_828_224),
    "vit_large_patch16_224": (304_326_632, 61_554_712_576),
    "vit_huge_patch14_224": (632_045_800, 167_295_109_120),
    "deit_base_distilled_patch16_224": (87_338_192, 17_656_811_520),
    "beit_base_patch16_224": (86_530_984, 17_563_828_224),
    "beit_large_patch16_224": (304_430_568, 61_554_712_576),
    "eva_giant_patch14_224": (1_012_555_112, 267_031_491_584),
    "eva02_tiny_patch14_336": (5_756_584, 4_662_312_960),
    "eva02_small_patch14_336": (22_129_000, 15_450_537_984),
    "eva02_base_patch14_448": (87_117_544, 106_886_332_416),
    "eva02_large_patch14_448": (305_080_232, 361_747_161_088),
}


def randomized(model):
    """Tokens and positions too, which model_helpers.randomize makes small."""
    randomize(model)
    generator = torch.Generator().manual_seed(2)
    for name in ("cls_token", "dist_token", "mask_token", "pos_embed"):
        parameter = getattr(model, name, None)
        if parameter is not None and parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return model.eval()


def images(size, batch=2, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_counts(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_and_shapes_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


def slide_row(model, size):
    """(parameters in millions, GFLOPs to one decimal), as the lecture's tables print them."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.eval()(torch.empty(1, 3, size, size))
    return round(sum(p.numel() for p in model.parameters()) / 1e6), round(counter.get_total_flops() / 2e9, 1)


@pytest.mark.parametrize(
    "name, size, row",
    [
        ("vit_small_patch16_224", 224, (22, 4.6)),
        ("vit_base_patch16_224", 224, (87, 17.6)),
        ("vit_base_patch16_224", 384, (87, 55.5)),
        ("vit_large_patch16_224", 224, (304, 61.6)),
        ("vit_large_patch16_224", 384, (305, 191.1)),
    ],
)
def test_the_lectures_rows(name, size, row):
    """DeiT-S and B, ViT-S, B and L in the ConvNeXt paper's result tables."""
    assert slide_row(build_meta(name, img_size=size), size) == row


NARROW = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 56, "num_classes": 10}
CASES = {
    "vit_tiny_patch16_224": (vit.vit_tiny_patch16_224, {"img_size": 64, "num_classes": 10}),
    "deit_base_distilled_patch16_224": (lambda **kw: vit.VisionTransformer(distilled=True, **kw), {**NARROW, "img_size": 64}),
    "beit_base_patch16_224": (beit.Beit, {**NARROW, "img_size": 64}),
    "eva_giant_patch14_224": (lambda **kw: eva.Eva(hidden=64 * 6144 // 1408, mlp="gelu", rotary=False, **kw), NARROW),
    "eva02_tiny_patch14_336": (eva.eva02_tiny_patch14_336, {"img_size": 56, "num_classes": 10}),
    "eva02_base_patch14_448": (lambda **kw: eva.Eva(hidden=64 * 8 // 3, mlp="swiglu_norm", qkv_fused=False, **kw), NARROW),
}


@pytest.mark.parametrize("name", CASES)
def test_parity_with_timm(name):
    """The smallest member of each code path, at a small size; a base or giant one with fewer channels and blocks."""
    build, kw = CASES[name]
    ours, theirs = randomized(build(**kw)), timm.create_model(name, **kw)
    theirs.load_state_dict(ours.state_dict())
    x = images(kw["img_size"])
    check_same_logits(ours, theirs, x)
    with torch.inference_mode():
        expected = theirs.eval()(x)
        for parameter in [p for n, p in ours.named_parameters() if n.endswith(("bias_table", "pos_embed"))] or ours.parameters():
            parameter.copy_(parameter.flip(-2))  # positions are seen
        assert torch.linalg.norm(ours(x) - expected) > 1e-4 * torch.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_base_distilled_patch16_224", "beit_base_patch16_224", "eva02_base_patch14_448"])
def test_parity_of_whole_models(name):
    """The smallest bundled member of those code paths that the quick tests only see narrow."""
    size = 112 if "14" in name else 128
    ours = randomized(MODELS[name].build(num_classes=10, img_size=size))
    theirs = timm.create_model(name, num_classes=10, img_size=size)
    theirs.load_state_dict(ours.state_dict())
    check_same_logits(ours, theirs, images(size))


def test_rotary_embedding_is_relative():
    """q at p against k at p' depends on p - p' alone, and the class token does not turn."""
    table = eva.rotary_table(16, 5, 5)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    q, k = (eva.rotate(v.expand(1, 1, 26, 16), table)[0, 0] for v in (q, k))
    scores = (q[1:] @ k[1:].T).view(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 1, 2, 0], scores[2, 4, 4, 3])
    assert abs(scores[0, 1, 2, 0] - scores[0, 1, 2, 1]) > 1e-3
    assert torch.equal(eva.rotate(torch.ones(1, 1, 26, 16), table)[:, :, 0], torch.ones(1, 1, 16))
    torch.testing.assert_close(eva.rotary_table(16, 10, 5)[:, 2 * 10], table[:, 5])  # twice as fine, the same place


def test_stochastic_depth_is_one_text():
    """The copies of DropPath agree, and it draws one value an image whose expectation is 1."""
    modules = (beit, coatnet, eva, maxvit, mvitv2, swin, swin_v2, vit)
    assert len({inspect.getsource(module.DropPath) for module in modules}) == 1
    torch.manual_seed(0)
    drop, x = vit.DropPath(0.25).train(), torch.ones(4000, 2, 3)
    kept = drop(x)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert abs((kept[:, 0, 0] == 0).double().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(drop.eval()(x), x)


def test_deit_trains_two_heads():
    model = randomized(vit.VisionTransformer(32, 1, 2, img_size=32, num_classes=5, distilled=True))
    x = images(32)
    mean = model(x)
    model.distilled_training = True
    assert torch.equal(model(x), mean)
    heads = model.train()(x)
    assert isinstance(heads, tuple) and not torch.allclose(*heads)
    torch.testing.assert_close(sum(heads) / 2, mean)


@pytest.mark.parametrize(
    "build",
    [
        lambda: vit.VisionTransformer(32, 2, 2, img_size=32, num_classes=5, drop_path_rate=0.1),
        lambda: vit.VisionTransformer(32, 2, 2, img_size=32, num_classes=5, distilled=True),
        lambda: beit.Beit(32, 2, 2, img_size=48, num_classes=5, drop_path_rate=0.1),
        lambda: eva.Eva(32, 48, 2, 2, img_size=42, num_classes=5, mlp="swiglu_norm", qkv_fused=False),
        lambda: eva.Eva(32, 48, 2, 2, img_size=42, num_classes=5, drop_path_rate=0.1),
        lambda: eva.Eva(32, 48, 2, 2, img_size=42, num_classes=5, mlp="gelu", rotary=False),
    ],
    ids=["vit", "deit", "beit", "eva02 split", "eva02", "eva"],
)
def test_one_step_reaches_every_parameter(build):
    torch.manual_seed(0)
    model = build().train()
    x, labels = images(model.patch_embed.img_size, batch=4), torch.arange(4)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0, name
    before = F.cross_entropy(model.eval()(x), labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert F.cross_entropy(model(x), labels) < before


def test_beit_accepts_the_official_buffers():
    model = build_meta("beit_base_patch16_224")
    state = model.state_dict()
    with torch.device("meta"):
        state |= {f"blocks.{i}.attn.relative_position_index": torch.empty(197, 197, dtype=torch.long) for i in range(12)}
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict(state | {"blocks.0.attn.k_bias": state["blocks.0.attn.q_bias"]})


@pytest.mark.parametrize("build", [vit.vit_tiny_patch16_224, mae.mae_vit_base_patch16])
def test_another_image_size_is_named(build):
    with torch.device("meta"), pytest.raises(ValueError, match=r"must be 224x224 \(img_size\), got \(224, 192\)"):
        build()(torch.empty(1, 3, 224, 192))


@pytest.mark.parametrize(
    "size, params, macs",
    [
        ("base_patch16", 111_907_840, 9_781_133_312),
        ("large_patch16", 329_541_888, 20_755_783_680),
        ("huge_patch14", 657_074_508, 48_561_911_808),
    ],
)
def test_mae_counts_and_encoder(size, params, macs):
    """Encoder, decoder and both fixed position tables; without the decoder it is a ViT but for the head."""
    model, spec = build_meta(f"mae_vit_{size}").eval(), MODELS[f"mae_vit_{size}"]
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(1, 3, spec.resolution, spec.resolution))
    assert (sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2) == (params, macs)
    assert (spec.params, spec.gmacs) == (round(params / 1e6, 2), round(macs / 1e9, 2))
    encoder = {k: v for k, v in shapes(model.state_dict()).items() if not k.startswith(("decoder_", "mask_token"))}
    classifier = shapes(build_meta(f"vit_{size}_224").state_dict())
    assert encoder == {k: v for k, v in classifier.items() if not k.startswith("head.")}


def small_mae(**kw):
    config = {"patch_size": 8, "img_size": 32, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return mae.MaskedAutoencoder(32, 2, 2, **config, **kw)


def to_huggingface(state):
    """Our parameters under transformers' names."""
    names = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "cls_token": "vit.embeddings.cls_token",
        "mask_token": "decoder.mask_token",
        "decoder_blocks": "decoder.decoder_layers",
        "decoder_": "decoder.decoder_",
        "pos_embed": "vit.embeddings.position_embeddings",
        "blocks": "vit.layers",
        "norm.": "vit.layernorm.",
    }
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    renamed = {}
    for key, value in state.items():
        start = next(start for start in names if key.startswith(start))
        key = names[start] + key.removeprefix(start)
        for part in parts:
            key = key.replace(part, parts[part])
        if "attn.qkv" in key:
            renamed |= {key.replace("attn.qkv", f"attention.{x}_proj"): part for x, part in zip("qkv", value.chunk(3))}
        else:
            renamed[key] = value
    return renamed


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_mae_parity_with_huggingface(norm_pix_loss):
    """Loss, prediction and mask, for the same noise."""
    ours = randomized(small_mae(norm_pix_loss=norm_pix_loss))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 32}
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"patch_size": 8, "layer_norm_eps": 1e-6, "norm_pix_loss": norm_pix_loss}
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **{f"decoder_{k}": v for k, v in decoder.items()})).eval()
    state = to_huggingface(ours.state_dict())
    theirs.load_state_dict(state)
    x = images(32)
    with torch.inference_mode():
        loss, pred, mask = ours(x, generator=torch.Generator().manual_seed(3))
        expected = theirs(x, noise=torch.rand(2, 16, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert torch.linalg.norm(pred - expected.logits) <= 1e-5 * torch.linalg.norm(pred)


def test_mae_positions():
    """The official table: x before y, sines before cosines, frequencies from 1 down; the class token has none."""
    table = mae.sincos_pos_embed(16, 5)
    assert table.shape == (1, 26, 16) and not table[0, 0].any()
    for i, (y, x) in enumerate(itertools.product(range(5), range(5))):
        angles = [[place / 10000 ** (k / 4) for k in range(4)] for place in (x, y)]
        expected = [f(angle) for place in angles for f in (math.sin, math.cos) for angle in place]
        assert table[0, 1 + i].tolist() == pytest.approx(expected, abs=1e-6)


def test_mae_masks_three_quarters_at_random():
    x = torch.arange(2 * 196.0).view(2, 196, 1)
    kept, mask, restore = mae.random_masking(x, 0.75, torch.Generator().manual_seed(0))
    assert kept.shape == (2, 49, 1) and mask.sum(1).tolist() == [147, 147]
    assert not torch.equal(mask[0], mask[1])
    for i in range(2):
        assert set(kept[i, :, 0].tolist()) == set(x[i, mask[i] == 0, 0].tolist())
        filled = torch.cat([kept[i], torch.full((147, 1), -1.0)])[restore[i]]
        assert torch.equal(filled, torch.where(mask[i, :, None] == 0, x[i], -1.0))
    again = mae.random_masking(x, 0.75, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((kept, mask, restore), again))
    total = sum(mae.random_masking(x, 0.75, torch.Generator().manual_seed(i))[1] for i in range(200))
    assert abs(total / 200 - 0.75).max() < 5 * (0.75 * 0.25 / 200) ** 0.5  # no place is preferred


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_mae_reconstructs_what_it_is_told(norm_pix_loss):
    """A perfect prediction gives the image back and no loss; visible patches are never touched."""
    model, x = small_mae(norm_pix_loss=norm_pix_loss).eval(), images(32, 2)
    patches, mean, scale = model.targets(x)
    mask = (torch.arange(patches.shape[1]) % 4 > 0).float().expand(2, -1)
    perfect = (patches - mean) / scale
    torch.testing.assert_close(model.reconstruct(x, perfect, mask), x)
    assert model.forward_loss(x, perfect, mask) < 1e-12
    wrong = mae.patchify(model.reconstruct(x, perfect + 1, mask), model.patch_size)
    assert torch.equal(wrong[mask == 0], patches[mask == 0]) and (wrong - patches)[mask == 1].abs().min() > 1e-3


def test_mae_loss_sees_masked_patches_only():
    """Nothing of a masked patch reaches the encoder, and nothing of a visible one the loss but as context."""
    model, x = small_mae().eval(), images(32, 1)
    _, pred, mask = model(x, generator=torch.Generator().manual_seed(0))
    patches = mae.patchify(x, 8)
    assert torch.equal(mae.unpatchify(patches, 8), x)
    other = mae.unpatchify(torch.where(mask[..., None] == 1, patches + 5, patches), 8)
    assert torch.equal(model(other, generator=torch.Generator().manual_seed(0))[1], pred)
    visible = mae.unpatchify(torch.where(mask[..., None] == 0, patches + 5, patches), 8)
    torch.testing.assert_close(model.forward_loss(visible, pred, mask), model.forward_loss(x, pred, mask))
    assert model.forward_loss(other, pred, mask) > model.forward_loss(x, pred, mask) + 1
    expected = ((pred - patches)[mask == 1]).square().mean()
    torch.testing.assert_close(model.forward_loss(x, pred, mask), expected)


def test_mae_learns():
    """Every parameter but the fixed tables gets a gradient, and the loss on images of one colour each falls to a third."""
    torch.manual_seed(0)
    model = small_mae()
    x = torch.randn(8, 3, 1, 1).expand(-1, -1, 32, 32)
    fixed = {"pos_embed", "decoder_pos_embed"}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == fixed
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(30):
        loss = model(x, generator=generator)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert name in fixed or (parameter.grad.isfinite().all() and parameter.grad.count_nonzero() > 0), name
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]
