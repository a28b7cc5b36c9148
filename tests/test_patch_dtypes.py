"""Dtypes inside a patched block, under autocast and where norms stay in float32."""

import pytest
import timm
import torch
from patch_helpers import relative
from patch_small import OPS, backends, images, pair
from torch import nn

import fastconv
from fastconv.patching._run_body import output_dtype

pytestmark = pytest.mark.usefixtures("one_thread")


def test_half_model_with_float32_norms():
    model, plain = pair()
    for m in (model, plain):
        m.to(torch.bfloat16)
        for block in m:
            block.norm.float()
    with pytest.warns(RuntimeWarning, match="input, convolution and norm have different dtypes"):
        actual = model(images().bfloat16())
    assert torch.allclose(actual, plain(images().bfloat16()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_what_reads_the_norm_sees_what_it_would_have_seen(conv_mlp):
    norm = timm.layers.LayerNorm2d if conv_mlp else timm.layers.LayerNorm
    model, plain = pair(conv_mlp=conv_mlp, norm_layer=norm)
    seen = []
    for m in (model, plain):
        m[0].mlp.fc1.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
        m[1].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(RuntimeWarning, match="gelu_linear in 1 .* a hook sits on mlp"):
        actual, expected = model(images()), plain(images())
    assert seen[:2] == seen[2:]
    assert backends(model) == {**dict.fromkeys(OPS, "cpu"), "gelu_linear": "eager"}
    assert relative(actual, expected) < 1e-2


def test_norm_in_autocasts_dtype_only_where_nobody_sees_it():
    """Where autocast returns float32 from LayerNorm, a plain Linear may be handed its own dtype at once, and nothing else may."""

    class LoRA(nn.Linear):
        pass

    def dtype(block, device="cuda"):
        return output_dtype(block, block._fastconv.layout.consumer_kinds, device, torch.bfloat16)

    model, _ = pair(blocks=4)
    assert dtype(model[0]) == torch.bfloat16
    model[1].mlp.fc1.register_forward_hook(lambda *_: None)
    model[2].mlp.register_forward_pre_hook(lambda *_: None)
    model[3].mlp.fc1.__class__ = LoRA
    assert [dtype(block) for block in model[1:]] == [torch.float32] * 3
    own = nn.Sequential(timm.models.convnext.ConvNeXtBlock(8))
    own[0].mlp = nn.Sequential(nn.GELU(), nn.Linear(8, 8))
    fastconv.patch(own)
    assert dtype(own[0]) == torch.float32, "an activation comes first"
    assert dtype(own[0], "cpu") == torch.bfloat16
