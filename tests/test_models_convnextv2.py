"""Bundled ConvNeXt V2 against published counts, the checkpoints' keys and timm; FCMAE against its sparse meaning."""

import copy
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import build_meta, check_counts, check_same_logits, randomize, shapes
from sklearn.datasets import load_digits
from timm.models.convnext import checkpoint_filter_fn

import fastconv
from fastconv.models import MODELS, convnextv2
from fastconv.models.fcmae import FCMAE, PATCH, fcmae, patchify, unpatchify

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "convnextv2_atto": (3_708_400, 547_332_480),
    "convnextv2_femto": (5_233_240, 779_629_824),
    "convnextv2_pico": (9_066_280, 1_367_055_360),
    "convnextv2_nano": (15_623_800, 2_445_528_320),
    "convnextv2_tiny": (28_635_496, 4_455_531_264),
    "convnextv2_base": (88_717_800, 15_354_729_472),
    "convnextv2_large": (197_956_840, 34_361_433_600),
    "convnextv2_huge": (660_289_640, 114_922_100_480),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_counts(name, *COUNTS[name])
    assert name in fastconv.list_models("convnextv2*")


@pytest.mark.parametrize("name", COUNTS)
def test_every_key_and_shape_maps_onto_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    assert shapes(checkpoint_filter_fn(build_meta(name).state_dict(), theirs)) == shapes(theirs.state_dict())


def block_keys():
    layers = {f"{part}.{kind}" for part in ("dwconv", "norm", "pwconv1", "pwconv2") for kind in ("weight", "bias")}
    return layers | {"grn.gamma", "grn.beta"}


def test_checkpoint_keys():
    """The names in the published checkpoints."""
    state = build_meta("convnextv2_atto").state_dict()
    expected = {f"stages.{i}.{j}.{key}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth) for key in block_keys()}
    expected |= {f"downsample_layers.{i}.{j}.{kind}" for i in range(4) for j in range(2) for kind in ("weight", "bias")}
    expected |= {f"{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}
    assert set(state) == expected
    assert state["stages.3.1.grn.gamma"].shape == state["stages.3.1.grn.beta"].shape == (1, 1, 1, 4 * 320)


def test_numerical_parity_with_timm():
    ours = randomize(convnextv2.convnextv2_atto(num_classes=10)).eval()
    theirs = timm.create_model("convnextv2_atto", num_classes=10).eval()
    theirs.load_state_dict(checkpoint_filter_fn(ours.state_dict(), theirs))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    check_same_logits(ours, theirs, images)
    swapped = copy.deepcopy(ours)
    with torch.no_grad():
        swapped.stages[1][1].grn.gamma.copy_(ours.stages[1][1].grn.gamma.flip(-1))
        expected = theirs(images)
        assert torch.linalg.norm(swapped(images) - expected) > 1e-4 * torch.linalg.norm(expected)  # one block's GRN is seen


def test_channels_classes_and_initialisation():
    model = convnextv2.convnextv2_atto(in_chans=1, num_classes=7, head_init_scale=0.001, drop_path_rate=0.3)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert abs(model.stages[3][0].pwconv1.weight.std().item() - 0.02) < 1e-3
    assert abs(model.head.weight.std().item() - 2e-5) < 2e-6
    assert not any(p.any() for name, p in model.named_parameters() if "grn" in name)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])


@pytest.mark.parametrize("name", [n if n.endswith("atto") else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_every_site_is_fused(name):
    with torch.device("meta"):
        model = fastconv.create_model(name, fused=True)
    report = fastconv.report(model)
    blocks = sum(isinstance(m, convnextv2.Block) for m in model.modules())
    assert blocks > 0 and report.blocks == (blocks, blocks) and not report.declined
    assert Counter(site.op for site in report.fused) == dict.fromkeys(MODELS[name].ops, blocks)
    assert shapes(model.state_dict()) == shapes(build_meta(name).state_dict())


def test_fused_model_computes_the_same():
    kw = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
    plain = randomize(convnextv2.ConvNeXtV2(**kw))
    fused = convnextv2.ConvNeXtV2(**kw)
    fused.load_state_dict(plain.state_dict())
    assert fastconv.patch(fused).blocks == (5, 5)
    images = random_images(2, 64, 64)
    expected, got = plain(images), fused(images)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
    for loss in (expected.square().sum(), got.square().sum()):
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters()):
        assert torch.linalg.norm(b.grad - a.grad) <= 1e-4 * torch.linalg.norm(a.grad), name


# --- FCMAE

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "decoder_dim": 16}


def random_images(N, H, W):
    return torch.randn(N, 3, H, W, generator=torch.Generator().manual_seed(3))


def small_fcmae(**kw):
    torch.manual_seed(0)
    return randomize(FCMAE(**{**SMALL, **kw}))


def naive_encoder(encoder, image, visible_patches):
    """The sparse encoder, one visible pixel at a time: dictionaries of (row, column) to a vector; what is hidden is not there."""

    def norm(layer, v):
        return F.layer_norm(v, v.shape, layer.weight, layer.bias, layer.eps)

    def convolve(layer, pixels, positions, taps):
        """Each tap is (tap row, tap column, position it reads, from the output's position)."""
        out = {}
        for p in positions:
            v = layer.bias.clone()
            for i, j, source in taps(*p):
                if source in pixels:
                    weight = layer.weight[:, :, i, j]
                    v = v + (weight[:, 0] * pixels[source] if layer.groups > 1 else weight @ pixels[source])
            out[p] = v
        return out

    def strided(layer, pixels):
        K = layer.stride[0]
        positions = sorted({(r // K, c // K) for r, c in pixels})
        return convolve(layer, pixels, positions, lambda r, c: [(i, j, (r * K + i, c * K + j)) for i in range(K) for j in range(K)])

    def block(b, pixels):
        around = [(i, j) for i in range(7) for j in range(7)]
        y = convolve(b.dwconv, pixels, pixels, lambda r, c: [(i, j, (r + i - 3, c + j - 3)) for i, j in around])
        y = {p: F.gelu(b.pwconv1(norm(b.norm, v))) for p, v in y.items()}
        g = torch.stack(list(y.values())).square().sum(0).sqrt()  # over the visible positions
        n = g / (g.mean() + 1e-6)
        gamma, beta = b.grn.gamma.flatten(), b.grn.beta.flatten()
        return {p: pixels[p] + b.pwconv2(gamma * (v * n) + beta + v) for p, v in y.items()}

    pixels = {
        (r * PATCH + i, c * PATCH + j): image[:, r * PATCH + i, c * PATCH + j]
        for r, c in visible_patches
        for i in range(PATCH)
        for j in range(PATCH)
    }
    stem, *halvings = encoder.downsample_layers
    pixels = {p: norm(stem[1], v) for p, v in strided(stem[0], pixels).items()}
    for i, stage in enumerate(encoder.stages):
        if i:
            pixels = strided(halvings[i - 1][1], {p: norm(halvings[i - 1][0], v) for p, v in pixels.items()})
        for b in stage:
            pixels = block(b, pixels)
    return pixels


def _unmasked(encoder):
    plain = convnextv2.Encoder((1, 1, 1, 1), (4, 6, 8, 10), 3, 0.0)
    plain.load_state_dict(encoder.state_dict())
    return plain


def test_masked_encoder_is_the_sparse_one():
    encoder = small_fcmae(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10)).encoder.eval()
    images = random_images(2, 64, 96)
    mask = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 1, 1], [1, 1, 0]]], dtype=torch.bool)
    with torch.no_grad():
        actual = encoder(images, mask)
        for image, hidden, features in zip(images, mask, actual):
            visible = [tuple(p) for p in (~hidden).nonzero().tolist()]
            expected = naive_encoder(encoder, image, visible)
            assert set(expected) == set(visible)
            for r, c in visible:
                assert torch.linalg.norm(features[:, r, c] - expected[r, c]) <= 1e-5 * torch.linalg.norm(expected[r, c])
            assert not features[:, hidden].any()
        nothing_hidden = encoder(images, torch.zeros_like(mask))
        torch.testing.assert_close(nothing_hidden, _unmasked(encoder)(images), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(nothing_hidden[0, :, ~mask[0]], actual[0, :, ~mask[0]])


def test_hidden_positions_stay_zero_in_every_layer():
    encoder = small_fcmae().encoder
    mask = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    seen = []

    def check(module, args, out):
        hidden = mask.repeat_interleave(out.shape[2] // 2, 1).repeat_interleave(out.shape[3] // 3, 2)
        seen.append(out.movedim(1, -1)[hidden].abs().max().item())
        assert out.movedim(1, -1)[~hidden].abs().min(0).values.max() > 0

    for stage in encoder.stages:
        for block in stage:
            block.register_forward_hook(check)
    encoder(random_images(3, 64, 96), mask)
    assert seen == [0.0] * 5


@pytest.mark.parametrize("value", [100.0, float("inf"), float("nan")])
def test_hidden_pixels_change_nothing(value):
    model = small_fcmae()
    images = random_images(2, 64, 96)
    mask = model.random_mask(images, torch.Generator().manual_seed(0))
    other = images.clone()
    hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(images)
    other[hidden] = value
    images.requires_grad_()
    features = model.encoder(images, mask)
    assert torch.equal(features, model.encoder(other, mask))
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert not gradient[hidden].any() and gradient[~hidden].any()
    visible = images.detach().clone()
    visible[(~hidden).nonzero()[0].unbind()] += 1
    assert not torch.equal(features, model.encoder(visible, mask))


def test_masks():
    model = FCMAE(**SMALL, mask_ratio=0.6)
    images = torch.zeros(64, 3, 7 * PATCH, 7 * PATCH)
    mask = model.random_mask(images, torch.Generator().manual_seed(0))
    assert mask.shape == (64, 7, 7) and mask.dtype == torch.bool
    assert set(mask.flatten(1).sum(1).tolist()) == {30}  # 29.4, and a patch is hidden or not
    assert len({tuple(m.flatten().tolist()) for m in mask}) == 64, "each image its own"
    share = mask.double().mean(0)
    assert (share - 30 / 49).abs().max() < 4.5 * (0.24 / 64) ** 0.5, "any patch as likely as any other"
    again = model.random_mask(images, torch.Generator().manual_seed(0))
    assert torch.equal(mask, again) and not torch.equal(mask, model.random_mask(images, torch.Generator().manual_seed(1)))
    state = torch.get_rng_state()
    model.random_mask(images, torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    assert FCMAE(**SMALL, mask_ratio=0.25).random_mask(torch.zeros(1, 3, 128, 128)).sum() == 4
    for ratio in (0, 1):
        with pytest.raises(ValueError, match="mask_ratio must be in"):
            FCMAE(**SMALL, mask_ratio=ratio)
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.zeros(1, 3, 64, 48))


def test_loss_is_over_hidden_patches_of_normalised_pixels():
    model = small_fcmae().double()
    images = random_images(2, 64, 96).double() * 7 + 3
    loss, pred, mask = model(images, generator=torch.Generator().manual_seed(0))
    assert pred.shape == (2, 2, 3, 32 * 32 * 3) and mask.shape == (2, 2, 3) and loss.ndim == 0
    errors = []
    for n, r, c in mask.nonzero().tolist():
        patch = images[n, :, r * 32 : r * 32 + 32, c * 32 : c * 32 + 32].permute(1, 2, 0).flatten()
        errors.append((pred[n, r, c] - (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    given, _, same = model(images, mask)
    assert torch.equal(given, loss) and same is mask


def test_decoder_sees_a_token_in_each_hidden_place():
    model = small_fcmae()
    mask = torch.tensor([[[True, False]]])
    seen = []
    model.decoder[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    features = torch.randn(1, 24, 1, 2)
    model.decode(features, mask)
    assert torch.equal(seen[0][0, :, 0, 0], model.mask_token.flatten())
    torch.testing.assert_close(seen[0][0, :, 0, 1], model.proj(features)[0, :, 0, 1])


def test_patches_and_reconstruction():
    images = random_images(2, 64, 96)
    assert torch.equal(unpatchify(patchify(images)), images)
    assert torch.equal(patchify(images)[1, 1, 2, :3], images[1, :, 32, 64])
    model = small_fcmae()
    mask = model.random_mask(images)
    hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None].expand_as(images)
    right = model.reconstruct(images, model.targets(images)[0], mask)
    torch.testing.assert_close(right, images, rtol=1e-5, atol=1e-5)
    wrong = model.reconstruct(images, torch.zeros_like(patchify(images)), mask)
    assert torch.equal(wrong[~hidden], images[~hidden]) and not torch.allclose(wrong[hidden], images[hidden])


def test_keys():
    """Decoder and token as published; the encoder's weights go into a ConvNeXtV2 for fine-tuning."""
    with torch.device("meta"):
        model, v2 = fcmae("tiny"), convnextv2.convnextv2_tiny()
    state = shapes(model.state_dict())
    own = {name: shape for name, shape in state.items() if not name.startswith("encoder.")}
    assert set(own) == {"mask_token", "proj.weight", "proj.bias", "pred.weight", "pred.bias"} | {f"decoder.0.{k}" for k in block_keys()}
    assert own["mask_token"] == (1, 512, 1, 1) and own["pred.weight"] == (3072, 512, 1, 1)
    assert own["decoder.0.pwconv1.weight"] == (2048, 512)
    encoder = {name.removeprefix("encoder."): shape for name, shape in state.items() if name.startswith("encoder.")}
    assert encoder == {name: shape for name, shape in shapes(v2.state_dict()).items() if name.split(".")[0] not in ("norm", "head")}
    missing, unexpected = v2.load_state_dict(model.encoder.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"norm", "head"}


def test_every_parameter_learns():
    model = small_fcmae(drop_path_rate=0.1)
    model(random_images(4, 64, 64), generator=torch.Generator().manual_seed(0))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_loss_falls_on_real_images():
    """Digits four times enlarged, four to a row and to a column: neighbours say nothing about a hidden one but its style."""
    digits = torch.from_numpy(load_digits().images).float() / 8 - 1
    torch.manual_seed(0)
    model = FCMAE((1, 1, 2, 1), (16, 24, 32, 48), in_chans=1, decoder_dim=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        chosen = digits[torch.randint(len(digits), (8,), generator=generator)]
        images = F.interpolate(chosen[:, None], size=(128, 128), mode="bilinear")
        loss, _, _ = model(images, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0.8 < sum(losses[:3]) / 3 < 1.3, "normalised pixels: predicting nothing costs 1"
    assert sum(losses[-5:]) / 5 < 0.75 * sum(losses[:3]) / 3, losses
