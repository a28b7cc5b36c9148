"""What a training step of a patched model keeps for the backward pass."""

import copy

import pytest
import timm
import torch
from patch_small import make
from test_patch_grn import v2_blocks

import fastconv

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_bytes(model, x):
    """Bytes of the distinct storages that autograd keeps for the backward pass, without parameters and the input."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    storages, kept = {}, []

    def pack(t):
        kept.append(t)  # alive, so that no address is used twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum().backward()
    return sum(n for address, n in storages.items() if address not in known)


@pytest.mark.parametrize(("kind", "fewer"), [("v2", 2), ("v2 conv_mlp", 2), ("v1", 1)])
def test_hidden_activations_that_are_no_longer_kept(kind, fewer):
    """Of GELU's input and result, GRN's product and sum, two are left; of GELU's input and result before a linear layer one."""
    plain = make() if kind == "v1" else v2_blocks(conv_mlp="conv" in kind)
    model = copy.deepcopy(plain)
    fastconv.patch(model, ops=("global_response_norm", "gelu_linear"))
    x = torch.randn(4, 8, 16, 12).to(memory_format=torch.channels_last)
    hidden = len(plain) * x.numel() * 4 * x.element_size()
    assert saved_bytes(model, x) <= saved_bytes(plain, x) - fewer * hidden + 4 * 4 * 4 * 32 * len(plain)  # statistics


@pytest.mark.slow
def test_a_training_step_of_convnextv2_tiny():
    """Everything fused: the maps that the convolutions, norms and tails no longer keep come on top."""
    torch.manual_seed(0)
    plain = timm.create_model("convnextv2_tiny").train()
    model = copy.deepcopy(plain)
    assert fastconv.patch(model).blocks == (18, 18)
    x = torch.randn(2, 3, 224, 224)
    pixels = {dim: 2 * (56 * 96 // dim) ** 2 for dim in (96, 192, 384, 768)}
    hidden = sum(depth * pixels[dim] * 4 * dim * 4 for depth, dim in zip((3, 3, 9, 3), pixels))
    before, after = saved_bytes(plain, x), saved_bytes(model, x)
    assert after <= before - 2 * hidden, (before, after, hidden)
