"""patch on the official structure, written out as people have it in their own code, and on the bundled models."""

import pytest
import torch
import torch.nn.functional as F
from patch_contract import PatchContract, assert_agree, fast_blocks, randomise_, step
from torch import nn

import fastconv


class ChannelNorm(nn.Module):
    """A LayerNorm for both layouts that is no nn.LayerNorm."""

    def __init__(self, dim, eps=1e-6, data_format="channels_last"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps, self.data_format, self.normalized_shape = eps, data_format, (dim,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * (x - mean) / torch.sqrt(variance + self.eps) + self.bias[:, None, None]


class ResponseNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (energy / (energy.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class SkipImages(nn.Module):
    """Stochastic depth by torch.rand: another stream of random numbers than Bernoulli's."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class Block(nn.Module):
    def __init__(self, dim, drop=0.0, scale=1e-6, grn=False):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = ChannelNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        if grn:
            self.grn = ResponseNorm(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(scale * torch.ones(dim)) if scale else None
        self.drop_path = SkipImages(drop) if drop else nn.Identity()

    def forward(self, x):
        residual = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.act(self.pwconv1(self.norm(x)))
        if hasattr(self, "grn"):
            x = self.grn(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        return residual + self.drop_path(x.permute(0, 3, 1, 2))


class Network(nn.Module):
    def __init__(self, drop=0.0, **kw):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelNorm(16, data_format="channels_first"))
        self.stage1 = nn.Sequential(Block(16, **kw), Block(16, drop, **kw))
        self.down = nn.Sequential(ChannelNorm(16, data_format="channels_first"), nn.Conv2d(16, 24, 2, 2))
        self.stage2 = nn.Sequential(Block(24, drop, **kw))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.stage2(self.down(self.stage1(self.stem(x)))).mean((2, 3)))


class TestV1(PatchContract):
    blocks = 3

    def make(self, drop_path=0.0):
        return Network(drop_path)


class TestV2(PatchContract):
    blocks = 3

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


class NormFirst(Block):
    def forward(self, x):
        y = self.dwconv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path((self.gamma * self.pwconv2(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2))


class Functional(Block):
    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + self.drop_path((self.gamma * y).permute(0, 3, 1, 2))


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
        (NormFirst, "another computation"),
        (Functional, "gelu"),
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
    assert [s.op for s in report.fused] == ["depthwise_conv_norm"]
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


def test_layouts_share_one_class():
    """As many classes as blocks would make regional compilation recompile for each."""
    model = Network(0.5)
    fastconv.patch(model)
    kinds = {type(b) for b in fast_blocks(model)}
    assert len(kinds) == 2  # with and without drop path
    again = Network(0.5)
    fastconv.patch(again)
    assert {type(b) for b in fast_blocks(again)} == kinds
