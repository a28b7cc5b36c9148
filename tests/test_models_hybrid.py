"""MaxViT, CoAtNet and MViTv2 against published counts and timm."""

import pytest
import timm
import torch
import torch.nn.functional as F
from model_helpers import build_meta, check_counts, check_same_logits, randomize, shapes
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

from fastconv.models import MODELS, coatnet, maxvit, mvitv2

pytestmark = pytest.mark.usefixtures("one_thread")

# name: parameters, multiply-accumulates of one 224x224 image
COUNTS = {
    "maxvit_tiny_tf_224": (30_916_528, 5_545_201_664),
    "maxvit_small_tf_224": (68_927_956, 11_579_172_864),
    "maxvit_base_tf_224": (119_467_708, 23_901_935_616),
    "maxvit_large_tf_224": (211_785_560, 43_492_564_992),
    "maxvit_xlarge_tf_224": (474_951_952, 97_213_845_504),
    "coatnet_0_224": (25_036_820, 4_546_507_776),
    "coatnet_1_224": (42_225_776, 8_643_499_008),
    "coatnet_2_224": (74_684_744, 16_427_134_976),
    "coatnet_3_224": (166_966_264, 36_453_156_864),
    "coatnet_4_224": (275_425_288, 62_316_840_960),
    "mvitv2_tiny": (24_173_320, 4_676_957_952),
    "mvitv2_small": (34_870_216, 6_959_715_072),
    "mvitv2_base": (51_472_744, 10_102_438_656),
    "mvitv2_large": (217_992_952, 43_711_209_216),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_gmacs(name):
    check_counts(name, *COUNTS[name])


@pytest.mark.parametrize("name", COUNTS)
def test_keys_and_shapes_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000)
    assert shapes(build_meta(name).state_dict()) == shapes(theirs.state_dict())


def randomized(model):
    """BatchNorm's statistics too."""
    randomize(model)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


DIMS, DEPTHS = (32, 64, 96, 128), (1, 2, 2, 1)
NARROW = {"embed_dim": DIMS, "depths": DEPTHS, "stem_width": 16, "head_hidden_size": 128}
BUILDS = {
    "maxvit_tiny_tf_224": lambda **kw: maxvit.MaxVit(DIMS, DEPTHS, 16, **kw),
    "coatnet_0_224": lambda **kw: coatnet.CoAtNet(DIMS, DEPTHS, 16, **kw),
    "mvitv2_tiny": lambda **kw: mvitv2.MultiScaleVit(DEPTHS, 16, **kw),
    "mvitv2_large": lambda **kw: mvitv2.MultiScaleVit(DEPTHS, 32, 2, expand_attn=False, **kw),
}


@pytest.mark.parametrize("name, size", [("maxvit_tiny_tf_224", (96, 192)), ("coatnet_0_224", (96, 96))])
def test_parity_with_timm(name, size):
    """Fewer channels and blocks, windows of 3x3. MaxViT also on a map twice as wide."""
    ours = randomized(BUILDS[name](img_size=96, num_classes=10))
    theirs = timm.create_model(name, img_size=96, num_classes=10, **NARROW)
    theirs.load_state_dict(ours.state_dict())
    x = images(*size)
    check_same_logits(ours, theirs, x)
    with torch.inference_mode():
        expected = theirs(x)
        for parameter in [p for n, p in ours.named_parameters() if n.endswith("bias_table")]:
            parameter.copy_(parameter.flip(0, -1) if name[0] == "m" else parameter.flip(0))
        assert torch.linalg.norm(ours(x) - expected) > 1e-4 * torch.linalg.norm(expected)  # positions are seen


@pytest.mark.parametrize("name, dim, heads, expand_attn", [("mvitv2_tiny", 16, 1, True), ("mvitv2_large", 32, 2, False)])
def test_mvitv2_parity_with_timm(name, dim, heads, expand_attn):
    """Both ways to widen, fewer channels and blocks, maps of 16x16 to 2x2."""
    ours = randomized(BUILDS[name](img_size=64, num_classes=10))
    config = MultiScaleVitCfg(depths=DEPTHS, embed_dim=dim, num_heads=heads, expand_attn=expand_attn)
    theirs = MultiScaleVit(config, img_size=64, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = images(64, 64)
    check_same_logits(ours, theirs, x)
    with torch.inference_mode():
        expected = theirs(x)
        for key, parameter in ours.named_parameters():
            if key.endswith("rel_pos_h"):
                parameter.copy_(parameter.flip(0))
        assert torch.linalg.norm(ours(x) - expected) > 1e-4 * torch.linalg.norm(expected)  # rows are not columns, nor reversed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "coatnet_0_224", "mvitv2_tiny"])
def test_parity_of_whole_models(name):
    """The smallest bundled members, at their native size."""
    ours, theirs = randomized(MODELS[name].build(num_classes=10)), timm.create_model(name, num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    check_same_logits(ours, theirs, images(224, 224, batch=1))


@pytest.mark.parametrize("grid", [False, True])
def test_windows_are_local_and_grids_dilated(grid):
    """What one place changes: its window's 4x4 neighbours, or the 16 places that lie 3 apart."""
    layer = randomized(maxvit.PartitionAttention(32, 4, grid, 0.0)).double()
    x = torch.randn(1, 12, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, 5, 9, 0] += 1
    changed = {(int(i), int(j)) for i, j in (layer(x) - layer(other)).abs().amax(-1)[0].gt(1e-9).nonzero()}
    rows, columns = (range(2, 12, 3), range(0, 12, 3)) if grid else (range(4, 8), range(8, 12))
    assert changed == {(i, j) for i in rows for j in columns}


@pytest.mark.parametrize("name", BUILDS)
def test_one_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = BUILDS[name](img_size=64, num_classes=5, drop_path_rate=0.1).train()
    x, labels = images(64, 64, batch=4), torch.arange(4)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        if not key.endswith("norm_k.bias"):  # the same for every key, which softmax does not see
            assert parameter.grad.abs().max() > 1e-9, key
    means = [b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")]
    assert bool(means) == ("mvit" not in name) and all(mean.any() for mean in means)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    before = F.cross_entropy(model(x), labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert F.cross_entropy(model(x), labels) < before


@pytest.mark.parametrize("name", BUILDS)
def test_sizes_that_do_not_fit_are_named(name):
    with torch.device("meta"):
        with pytest.raises(ValueError, match="img_size must be a multiple of 32, got 100"):
            BUILDS[name](img_size=100)
        with pytest.raises(ValueError, match=r"64.*\(img_size\), got \(64, 96\)"):
            BUILDS[name](img_size=64)(torch.empty(1, 3, 64, 96))
