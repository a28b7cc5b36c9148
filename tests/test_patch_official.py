"""patch on the official structure copied into user code, and on the bundled models."""

import pytest
import torch
import torch.nn.functional as F
from official_convnext import Block, ChannelNorm, Network, SkipImages
from patch_contract import V2, PatchContract, assert_agree, fast_blocks, randomise_, step
from torch import nn

import fastconv


class TestV1(PatchContract):
    blocks = 3

    def make(self, drop_path=0.0):
        return Network(drop_path)


class TestV2(PatchContract):
    blocks = 3
    ops = V2

    def make(self, drop_path=0.0):
        return Network(drop_path, scale=0.0, grn=True)


class TestBundled(PatchContract):
    blocks = 5

    def make(self, drop_path=0.0):
        from fastconv.models.convnext import ConvNeXt

        return ConvNeXt((1, 1, 2, 1), (8, 16, 24, 32), num_classes=10, drop_path_rate=drop_path)

    def test_saved_model_loads_without_fastconv(self, tmp_path):
        """Its class is fastconv's own; what matters is that it is saved as that class and comes back plain."""
        model, plain = self.pair()
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
        assert fastconv.report(loaded).blocks == (0, self.blocks)

    def test_nothing_of_ours_in_a_module_dict(self):
        model, plain = self.pair()
        for (name, a), b in zip(model.named_modules(), plain.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys(), name


class PostScaled(Block):
    """Scales the sum, not the branch."""

    def forward(self, x):
        return self.gamma.reshape(1, -1, 1, 1) * (
            x + self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        )


class NoResidual(Block):
    def forward(self, x):
        return self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


class Transposed(Block):
    """Swaps H and W on the way back: shapes fit for square images."""

    def forward(self, x):
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))))
        return x + self.drop_path((self.gamma * y).permute(0, 3, 2, 1))


class TwiceUsed(Block):
    """Adds what the convolution gave, too."""

    def forward(self, x):
        z = self.dwconv(x)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(z.permute(0, 2, 3, 1)))))
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2) + z)


class ChangesTheMap(Block):
    """Works in place on what the convolution gave: the chain of operations is the known one, the values are not."""

    def forward(self, x):
        z = self.dwconv(x)
        z.mul_(2)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(z.permute(0, 2, 3, 1)))))
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2))


class ChangesTheInput(Block):
    def forward(self, x):
        x.clamp_(min=0)
        return super().forward(x)


class AnotherEps(ChannelNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-3)


class NormFirst(Block):
    def forward(self, x):
        y = self.dwconv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path((self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2))


class Functional(Block):
    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2))


class DependsOnMode(Block):
    def forward(self, x):
        return super().forward(x) if self.training else NoResidual.forward(self, x)


class ScalesInTraining(Block):
    def forward(self, x):
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))))
        return x + self.drop_path((self.gamma * y if self.training else y).permute(0, 3, 1, 2))


class DependsOnData(Block):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (PostScaled, "does not end in a residual sum"),
        (NoResidual, "does not end in a residual sum"),
        (Transposed, "holds 'permute'"),
        (TwiceUsed, "which the fused block does not know"),
        (ChangesTheMap, "the output of dwconv is used twice"),
        (NormFirst, "another computation"),
        (Functional, "gelu"),
        (DependsOnMode, "does not end in a residual sum"),
        (ScalesInTraining, "in training than in eval mode"),
        (DependsOnData, "cannot be read symbolically"),
    ],
)
def test_same_parts_and_another_computation(kind, reason):
    """The names and types of the parts are the known ones; what forward does with them is not."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(kind(8), Block(8, scale=0.5)))
    x = torch.randn(2, 8, 6, 6)
    expected = step(model, x)
    report = fastconv.patch(model)
    assert report.blocks == (1, 2)
    assert {s.name for s in report.declined} == {"0"}
    assert all(reason in s.reason for s in report.declined), str(report)
    assert type(model[0]) is kind
    assert_agree(step(model, x), expected)


def test_block_that_works_in_place_on_its_input():
    block = randomise_(ChangesTheInput(8))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = block(x.clone())
        report = fastconv.patch(block)
        assert {s.reason for s in report.declined} == {"its input is used otherwise too"}
        assert torch.equal(block(x.clone()), expected)


class Renamed(Block):
    """A subclass with its own forward that computes the same."""

    def forward(self, images):
        y = self.act(self.pwconv1(self.norm(torch.permute(self.dwconv(images), (0, 2, 3, 1)))))
        y = torch.permute(self.pwconv2(y), (0, 3, 1, 2))
        return self.drop_path(y * self.gamma.view(1, -1, 1, 1)) + images


def test_same_computation_written_otherwise():
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(Renamed(8), Renamed(8, 0.3)))
    x = torch.randn(4, 8, 6, 5)
    torch.manual_seed(0)
    expected = step(model, x)
    assert fastconv.patch(model).blocks == (2, 2)
    torch.manual_seed(0)
    assert_agree(step(model, x), expected)


class NoisyPath(nn.Module):
    """Another random value a channel: no mask of one value an image can stand for it."""

    def forward(self, x):
        return x * torch.rand(x.shape[0], x.shape[1], *[1] * (x.ndim - 2)) if self.training else x


class HungryPath(SkipImages):
    """Draws one number more than its mask needs, by the shape of its input."""

    def forward(self, x):
        torch.rand(x.numel())
        return super().forward(x)


@pytest.mark.parametrize("kind", [NoisyPath, lambda: HungryPath(0.5), lambda: nn.Dropout(0.5), lambda: nn.Linear(5, 5)])
def test_drop_path_that_is_none(kind):
    torch.manual_seed(0)
    model = nn.Sequential(randomise_(Block(8)))
    model[0].drop_path = kind()
    x = torch.randn(16, 8, 6, 5)
    torch.manual_seed(1)
    expected, state = step(model, x), torch.get_rng_state()
    report = fastconv.patch(model)
    assert [s.op for s in report.declined] == ["residual_scale"]
    assert [s.op for s in report.fused] == ["depthwise_conv_norm", "gelu_linear"]
    torch.manual_seed(1)
    assert_agree(step(model, x), expected)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": 2}, "of stride 1"),
        ({"dilation": 3, "padding": 9}, "undilated"),
        ({"padding": 2}, '"same" size'),
        ({"padding_mode": "circular"}, '"same" size'),
        ({"kernel_size": (7, 5), "padding": (3, 2)}, "square and odd"),
        ({"groups": 4}, "depthwise"),
    ],
)
def test_convolution_that_the_op_is_not(change, reason):
    block = randomise_(Block(8))
    block.dwconv = nn.Conv2d(8, 8, **{"kernel_size": 7, "padding": 3, "groups": 8, **change})
    report = fastconv.patch(block)
    assert [s.op for s in report.declined] == ["depthwise_conv_norm"]
    assert reason in report.declined[0].reason


def test_norm_whose_eps_is_not_what_it_says():
    block = randomise_(Block(8))
    block.norm = AnotherEps(8)
    report = fastconv.patch(block)
    assert [s.op for s in report.declined] == ["depthwise_conv_norm"]
    assert "AnotherEps" in report.declined[0].reason


def test_class_wide_replacement_of_the_convolution(monkeypatch):
    """Another tool has put its own forward into torch.nn.Conv2d: it is not to be bypassed."""
    right = nn.Conv2d.forward

    def instrumented(self, x):
        return right(self, x) * 2

    monkeypatch.setattr(nn.Conv2d, "forward", instrumented)
    report = fastconv.patch(Block(8))
    assert [s.op for s in report.declined] == ["depthwise_conv_norm"]
    assert "instrumented" in report.declined[0].reason


def test_layouts_share_one_class():
    """As many classes as blocks would make regional compilation recompile for each."""
    model = Network(0.5)
    fastconv.patch(model)
    kinds = {type(b) for b in fast_blocks(model)}
    assert len(kinds) == 2  # with and without drop path
    again = Network(0.5)
    fastconv.patch(again)
    assert {type(b) for b in fast_blocks(again)} == kinds
