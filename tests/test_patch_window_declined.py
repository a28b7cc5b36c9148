"""What patch leaves alone in Swin models, and says so: other computations under the same names."""

import official_swin
import pytest
import timm
import torch
from patch_contract import fast_blocks, randomise_
from test_patch_window_attention import OP, official_v1, timm_v1, timm_v2
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import fastconv

pytestmark = pytest.mark.usefixtures("one_thread")
ANOTHER = "its forward computes something else than the attention of shifted windows that fastconv knows"
UNTRIED = "its forward cannot be tried on a small map"


def official(kind=official_swin.Block, size=(8, 12), window=4, shift=2, **kw):
    torch.manual_seed(0)
    return randomise_(kind(32, size, 2, window, shift, **kw))


class Scaled(official_swin.Block):
    def forward(self, x):
        x = x + 0.5 * self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PostNorm(official_swin.Block):
    forward = official_swin.BlockV2.forward


class WithoutMask(official_swin.Block):
    def attend(self, x):
        mask, self.attn_mask = self.attn_mask, None
        x = super().attend(x)
        self.attn_mask = mask
        return x


class RolledOtherwise(official_swin.Block):
    """Up instead of down: masks fit, neighbours are others."""

    def attend(self, x):
        H, W = self.input_resolution
        x = x.view(len(x), H, W, -1).flip(1, 2).flatten(1, 2)
        return super().attend(x).view(len(x), H, W, -1).flip(1, 2).flatten(1, 2)


class TakesAMask(official_swin.Block):
    """As in the official detection code."""

    def forward(self, x, mask_matrix):
        return super().forward(x)


class OnlyInTraining(official_swin.Block):
    def forward(self, x):
        return super().forward(x) if self.training else x


class WritesOverItsInput(official_swin.Block):
    def forward(self, x):
        return super().forward(x.mul_(2))


class ScoresOtherwise(official_swin.Attention):
    def logits(self, x):
        logits, v = super().logits(x)
        return logits.tril(), v


class HeadFirst(official_swin.Attention):
    """Packs the channels as (heads, 3, C)."""

    def logits(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        return (q * self.scale) @ k.transpose(-2, -1), v


class Differently(official_swin.Block):
    attention = ScoresOtherwise


class Packed(official_swin.Block):
    attention = HeadFirst


class Adapted(nn.Linear):
    """Stands for an adapter around a linear layer."""


def with_scrambled_index(block):
    block.attn.relative_position_index = block.attn.relative_position_index.flip(0)
    return block


def with_adapter(block):
    block.attn.qkv = Adapted(32, 96)
    return block


def with_another_dropout(block):
    block.attn.attn_drop = nn.AlphaDropout(0.1)
    return block


def with_another_mask(block):
    block.attn_mask = block.attn_mask.flip(0)
    return block


def timm_block(kind=SwinTransformerBlock, **kw):
    torch.manual_seed(0)
    return randomise_(kind(32, (8, 12), 2, window_size=4, shift_size=2, **kw))


class OwnAttention(SwinTransformerBlock):
    def _attn(self, x):
        return x + super()._attn(x)


class OwnForward(SwinTransformerBlock):
    """Does not call _attn at all."""

    def forward(self, x):
        return x + self.mlp(self.norm2(x))


def separate_bias():
    block = timm_v2().layers[0].blocks[0]
    block.attn.qkv_bias_separate = True
    return block


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: official(Scaled), ANOTHER),
        (lambda: official(PostNorm), ANOTHER),
        (lambda: official(WithoutMask), ANOTHER),
        (lambda: official(RolledOtherwise), ANOTHER),
        (lambda: official(Differently), ANOTHER),
        (lambda: official(Packed), ANOTHER),
        (lambda: official(WritesOverItsInput), ANOTHER),
        (lambda: with_another_mask(official()), ANOTHER),
        (lambda: official(OnlyInTraining), ANOTHER),
        (lambda: official(TakesAMask), f"{UNTRIED} (TypeError)"),
        (lambda: with_scrambled_index(official()), "its relative_position_index is not the standard one of its window"),
        (lambda: with_adapter(official()), "attn.qkv is a Adapted, not a plain Linear"),
        (lambda: with_another_dropout(official()), "attn.attn_drop is a AlphaDropout, not a Dropout"),
        (separate_bias, "it adds the bias of qkv on its own"),
        (lambda: timm_block(OwnAttention), ANOTHER),
        (lambda: timm_block(OwnForward), ANOTHER),
    ],
)
def test_other_computations(build, reason):
    block = build()
    kind = type(block)
    report = fastconv.patch(block, ops=OP)
    assert [(s.op, s.status, s.reason) for s in report.sites] == [(OP, "declined", reason)], str(report)
    assert type(block) is kind


def test_a_class_of_a_user_that_computes_the_same():
    class Renamed(SwinTransformerBlock):
        def _attn(self, x):
            return super()._attn(x) + 0

    assert fastconv.patch(timm_block(Renamed), ops=OP).blocks == (1, 1)


@pytest.mark.parametrize("name", ["swinv2_cr_tiny_224", pytest.param("maxvit_rmlp_pico_rw_256", marks=pytest.mark.slow)])
def test_other_families_are_not_touched(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert not [s for s in fastconv.patch(model).sites if s.op == OP]


def test_a_model_on_the_meta_device():
    """Its masks and indices have no values to look at; the class says what they will be."""
    with torch.device("meta"):
        models = timm_v1(), timm_v2()
    assert [fastconv.patch(model, ops=OP).blocks for model in models] == [(3, 3), (3, 3)]


def test_strict():
    model = timm_block()
    fastconv.patch(model, ops=OP, strict=True)
    model.attn.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a hook sits on attn"), pytest.warns(RuntimeWarning, match="a hook sits on attn"):
        model(torch.randn(2, 8, 12, 32))
    with pytest.raises(RuntimeError, match=ANOTHER):
        fastconv.patch(official(Scaled), ops=OP, strict=True)


def test_filter_and_names():
    model = official_v1()
    report = fastconv.patch(model, ops=OP, filter_fn=lambda name, _: name.startswith("high"))
    assert [s.name for s in report.sites] == ["high.0", "high.1"] and len(fast_blocks(model)) == 2
