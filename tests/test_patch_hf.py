"""patch on Hugging Face transformers: ConvNext, ConvNextV2 and the DINOv3 backbones."""

import pytest
import torch
from patch_contract import V2, PatchContract, SingleProcessContract, assert_agree, step
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
)

import fastconv

SIZES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}


class TestConvNext(PatchContract):
    blocks = 5

    def make(self, drop_path=0.0):
        return ConvNextModel(ConvNextConfig(**SIZES, drop_path_rate=drop_path))


class TestConvNextV2(PatchContract):
    blocks = 5
    ops = V2

    def make(self, drop_path=0.0):
        return ConvNextV2Model(ConvNextV2Config(**SIZES, drop_path_rate=drop_path))


class TestDINOv3ConvNext(SingleProcessContract):
    blocks = 5

    def make(self, drop_path=0.0):
        return DINOv3ConvNextModel(DINOv3ConvNextConfig(**SIZES, drop_path_rate=drop_path, layer_norm_eps=1e-5))


def test_default_model_is_fused():
    report = fastconv.patch(ConvNextModel(ConvNextConfig()))
    assert report.blocks == (18, 18)
    assert len(report.fused) == 54


def test_no_layer_scale():
    model, plain = (ConvNextModel(ConvNextConfig(**SIZES, layer_scale_init_value=0.0)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    report = fastconv.patch(model)
    assert {s.op for s in report.fused} == {"depthwise_conv_norm", "gelu_linear"}
    assert {s.reason for s in report.native} == {"a plain sum"}
    x = torch.randn(2, 3, 64, 64)
    assert_agree(step(model, x), step(plain, x))


def test_hidden_states_and_save_pretrained(tmp_path):
    model = ConvNextForImageClassification(ConvNextConfig(**SIZES, num_labels=5)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        fastconv.patch(model)
        actual = model(x, output_hidden_states=True)
        model.save_pretrained(tmp_path)
        again = ConvNextForImageClassification.from_pretrained(tmp_path).eval()(x)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for a, b in zip(actual.hidden_states, expected.hidden_states):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert torch.allclose(again.logits, expected.logits)


@pytest.mark.parametrize("data_format", ["channels_first"])
def test_norm_in_the_other_layout_is_declined(data_format):
    model = ConvNextModel(ConvNextConfig(**SIZES))
    model.encoder.stages[0].layers[0].layernorm.data_format = data_format
    report = fastconv.patch(model)
    assert report.blocks == (4, 5)
    assert [s.reason for s in report.declined] == ["the norm (ConvNextLayerNorm) is not a LayerNorm over the channels"]
