"""patch on torchvision's ConvNeXt."""

import pytest
import torch
import torchvision
from patch_contract import PatchContract, assert_agree, fast_blocks, relative, step
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import StochasticDepth

import fastconv


class TestConvNeXt(PatchContract):
    blocks = 3

    def make(self, drop_path=0.0):
        settings = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
        return ConvNeXt(settings, stochastic_depth_prob=drop_path, layer_scale=0.5, num_classes=10)

    def test_stochastic_depth_of_whole_batches(self):
        model, plain = self.pair(drop_path=0.5)
        for m in (model, plain):
            for module in m.modules():
                if isinstance(module, StochasticDepth):
                    module.mode = "batch"
        results = []
        for m in (model, plain):
            torch.manual_seed(0)
            results.append([outputs for outputs, _ in (step(m, self.images()) for _ in range(6))])
            results[-1].append([torch.get_rng_state()])
        for (a,), (b,) in zip(*results):
            assert relative(a, b) <= 1e-5
        assert not torch.equal(results[1][0][0], results[1][1][0])

    def test_sum_is_written_over_the_branch(self):
        """`result += input` keeps the branch's dtype: half parameters under autocast give a half sum with a float32 input."""
        model, plain = (fast.to(torch.bfloat16) for fast in self.pair())
        x = torch.randn(2, 24, 5, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, expected = model.features[3][0](x), plain.features[3][0](x)
        assert actual.dtype == expected.dtype == torch.bfloat16
        assert relative(actual, expected) < 2e-2
        assert {s.backend for s in fastconv.report(model.features[3][0]).fused} == {"cpu"}

    @pytest.mark.parametrize("index", [None, 1, 6])
    def test_hook_on_what_the_fused_path_leaves_out(self, index):
        """The Sequential and its Permute modules are never called when the block runs fused."""
        model, plain = self.pair()
        block = fast_blocks(model)[0].block
        fired = []
        (block if index is None else block[index]).register_forward_hook(lambda *_: fired.append(1))
        with pytest.warns(RuntimeWarning, match="a hook sits on block"):
            assert_agree(step(model, self.images()), step(plain, self.images()))
        assert fired == [1]


def test_convnext_tiny():
    report = fastconv.patch(torchvision.models.convnext_tiny())
    assert report.blocks == (18, 18)
    assert len(report.fused) == 54
