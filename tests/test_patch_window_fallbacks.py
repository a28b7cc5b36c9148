"""Calls of patched Swin models that only the original code can answer: counted, warned about, with the original's results."""

import copy
import warnings

import pytest
import torch
from patch_contract import assert_agree, randomise_, step
from test_patch_window_attention import (
    OP,
    hf_v1,
    hf_v2,
    images,
    timm_v1,
    timm_v2,
    torchvision_v1,
    torchvision_v2,
    without_key_bias_gradient,
)
from test_patch_window_declined import Adapted, official, timm_block
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.swin_transformer import ShiftedWindowAttention

import fastconv
from fastconv.ops import Choice, _registry, _window

pytestmark = pytest.mark.usefixtures("one_thread")


def fallbacks(model, *args, **kwargs):
    """The reasons counted in one call, in which every site of the op falls back, with one warning a reason; the result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model(*args, **kwargs)
    counted = [s.fallbacks for s in fastconv.report(model).sites if s.op == OP]
    assert all(sum(c.values()) == 1 for c in counted) and counted
    reasons = {reason for c in counted for reason in c}
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == len(reasons)
    return reasons, out


def both(model):
    plain = copy.deepcopy(model)
    assert fastconv.patch(model, ops=OP).fused
    return model, plain


DROPPED = "dropout of the attention drops values, in the order of the windows"


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm_v1(attn_drop_rate=0.3, img_size=(64, 32)),
        lambda: timm_v2(proj_drop_rate=0.3),
        lambda: torchvision_v1(attention_dropout=0.3),
        lambda: torchvision_v2(dropout=0.3),
        lambda: hf_v1(attention_probs_dropout_prob=0.3),
        lambda: hf_v1(hidden_dropout_prob=0.3),
        lambda: hf_v2(attention_probs_dropout_prob=0.3),
    ],
)
def test_dropout_in_training_draws_the_same_numbers(build):
    torch.manual_seed(0)
    model, plain = both(without_key_bias_gradient(randomise_(build())))
    x = images(timm_v2)
    results = []
    for m in (model, plain):
        torch.manual_seed(1)
        if m is model:
            with pytest.warns(RuntimeWarning, match=DROPPED):
                results.append(step(m, x))
        else:
            results.append(step(m, x))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
    assert {r for s in fastconv.report(model).sites for r in s.fallbacks} == {DROPPED}
    model.eval(), plain.eval()
    assert_agree(step(model, x), step(plain, x))
    assert {s.backend for s in fastconv.report(model).sites if s.op == OP} == {"cpu"}


def hooked(block):
    block.attn.proj_drop.register_forward_hook(lambda *_: None)


def replaced(block):
    block.attn.proj = Adapted(32, 32)


def half_table(block):
    block.attn.relative_position_bias_table.data = block.attn.relative_position_bias_table.data.bfloat16()


def without_mask(block):
    block.attn_mask = None


def parametrized(block):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(block.attn.qkv, "bias", Doubled())


@pytest.mark.parametrize(
    ("change", "shape", "reason"),
    [
        (hooked, (2, 8, 12, 32), "a hook sits on attn.proj_drop"),
        (replaced, (2, 8, 12, 32), "attn.proj is a Adapted, not a Linear"),
        (half_table, (2, 8, 12, 32), "the input and the parameters of the attention have different dtypes"),
        (without_mask, (2, 8, 12, 32), "attn_mask and shift_size contradict each other"),
        (parametrized, (2, 7, 12, 32), "the bias of a projection is parametrized, and padding needs it once more"),
    ],
)
def test_calls_of_a_block(change, shape, reason):
    model, plain = both(timm_block())
    change(model), change(plain)
    x = torch.randn(shape)
    with torch.no_grad():
        if change is replaced:
            plain.attn.proj.load_state_dict(model.attn.proj.state_dict())
        reasons, out = fallbacks(model, x)
        assert reasons == {reason}
        assert torch.equal(out, plain(x))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 8, 16, 32), "attn_mask is of another size than this map"),
        ((2, 12, 8, 32), "attn_mask is of another size than this map"),
        ((2, 8, 12, 16), "the input does not have the block's channels"),
        ((8, 12, 32), "the input is not (B, H, W, C)"),
    ],
)
def test_inputs_of_the_attention(shape, reason):
    """The method that holds the attention is called as it stands, so that errors of the original are its own."""
    model, plain = both(timm_block())
    x = torch.randn(shape)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs the original code"):
        try:
            expected = plain._attn(x)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)):
                model._attn(x)
        else:
            assert torch.equal(model._attn(x), expected)
    assert {r for s in fastconv.report(model).sites for r in s.fallbacks} == {reason}


def test_window_that_the_relative_positions_are_not_for():
    torch.manual_seed(0)
    model, _ = both(hf_v1(image_size=(32, 32)))  # maps of 8 and 4
    layer = model.encoder.layers[0].blocks[0]
    with pytest.raises(RuntimeError), pytest.warns(RuntimeWarning, match="the window is not the one that the relative positions are for"):
        layer(torch.randn(1, 9, 32), (3, 3))
    assert layer.window_size == 3, "for good, as the original has it"


def test_windows_too_large_for_a_gpus_kernels(monkeypatch):
    """The op would compute them by its reference: the original code is as good, and the report says so."""
    model, plain = both(timm_block())
    x = torch.randn(2, 8, 12, 32)
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert not any(s.fallbacks for s in fastconv.report(model).sites)
    monkeypatch.setattr(_registry, "select", lambda *_: Choice("triton"))
    monkeypatch.setattr(_registry, "missing", lambda op, backend, *_: "not built" if backend == "cuda" else "")
    monkeypatch.setattr(_window, "TRITON_TOKENS", 15)
    with torch.no_grad():
        reasons, out = fallbacks(model, x)
    assert reasons == {"triton: windows of 15 tokens at most, got (4, 4); cuda: not built"}
    assert torch.equal(out, plain(x))


def test_hugging_face_keeps_a_smaller_window():
    """A map of the window's own size ends the shift for good."""
    torch.manual_seed(0)
    model, plain = (m.eval() for m in both(randomise_(hf_v1(image_size=(32, 32)))))
    shifted = [m.encoder.layers[1].blocks[1] for m in (model, plain)]
    assert [layer.shift_size for layer in shifted] == [2, 2]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert [layer.shift_size for layer in shifted] == [0, 0]
    assert not any(s.fallbacks for s in fastconv.report(model).sites)


SHAPE = {"image_size": (64, 32)}
IMPLEMENTATION = 'its attn_implementation is not "sdpa"'


def weights_of_both(model, plain, change=None):
    """The reasons of a call that asks for the attention weights, which must be the original's."""
    for m in (model, plain):
        m.eval()
        if change:
            m.set_attn_implementation(change)
    x = images(hf_v2)
    with torch.no_grad():
        expected = plain(x, output_attentions=True).attentions
        reasons, actual = fallbacks(model, x, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(actual.attentions, expected, strict=True))
    return reasons, actual.attentions


def test_attention_weights_of_hugging_face():
    torch.manual_seed(0)
    reasons, weights = weights_of_both(*both(randomise_(hf_v2())))
    assert reasons == {"the attention weights are asked for"} and weights
    model, plain = both(randomise_(hf_v1(**SHAPE)))
    assert weights_of_both(model, plain)[0] == {"called with arguments that may ask for the attention weights"}
    reasons, weights = weights_of_both(*both(randomise_(hf_v1(**SHAPE))), change="eager")
    assert reasons == {"called with arguments that may ask for the attention weights"} and weights
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=IMPLEMENTATION):
        model(images(hf_v2))
    assert {s.reason for s in fastconv.patch(hf_v1(**SHAPE, attn_implementation="eager"), ops=OP).sites} == {IMPLEMENTATION}


def test_official_tokens_of_another_map():
    model, plain = both(official())
    for m in (model, plain):
        m.input_resolution = (8, 8)
    reasons = "the input is not (B, H * W, C) with the block's input_resolution, in whole windows"
    with pytest.raises(AssertionError), pytest.warns(RuntimeWarning, match="the input is not"):
        model(torch.randn(2, 96, 32))
    assert {r for s in fastconv.report(model).sites for r in s.fallbacks} == {reasons}


def test_other_arguments_and_tensors():
    class Named(torch.Tensor):
        pass

    torch.manual_seed(0)
    model, plain = both(randomise_(ShiftedWindowAttention(32, [4, 4], [2, 2], 2)))
    x = torch.randn(2, 8, 12, 32)
    with torch.no_grad():
        reasons, out = fallbacks(model, x=x)
        assert reasons == {"called with other arguments than one tensor"} and torch.equal(out, plain(x))
        with pytest.warns(RuntimeWarning, match="the input is a Named"):
            assert torch.equal(model(x.as_subclass(Named)).as_subclass(torch.Tensor), plain(x))
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(RuntimeWarning, match="autocast does not cast float64"):
            try:
                expected = plain.double()(x.double())
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    model.double()(x.double())
            else:
                assert torch.equal(model.double()(x.double()), expected)
