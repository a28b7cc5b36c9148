"""What a caller of patch, report and verify asks for and is told."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from patch_helpers import assert_agree, fast_blocks, randomise_, step
from patch_small import OPS, backends, images, make, pair
from torch import nn

import fastconv
from fastconv.ops import _registry

pytestmark = pytest.mark.usefixtures("one_thread")


def test_import_touches_nothing():
    code = (
        "import sys, fastconv; print([m for m in ('timm', 'torchvision', 'transformers') if m in sys.modules]);"
        "import timm; print(timm.models.convnext.ConvNeXtBlock.forward.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "timm.models.convnext"], done.stderr


def test_unknown_op_lists_the_known():
    with pytest.raises(ValueError, match="linear, squeeze_excite, window_attention, grouped_conv, got 'batch_norm'"):
        fastconv.patch(make(), ops=["residual_scale", "batch_norm"])


@pytest.mark.parametrize("op", OPS)
def test_one_op_alone(op):
    model, plain = make(drop_path=0.3), make(drop_path=0.3)
    report = fastconv.patch(model, ops=op)
    assert {s.op for s in report.sites} == {op}
    results = []
    for m in (model, plain):
        torch.manual_seed(0)
        results.append(step(m, images(8)))
    assert_agree(*results)
    assert backends(model) == {op: "cpu"}
    both = fastconv.patch(model)
    assert {s.op for s in both.fused} == set(OPS), "a later call decides anew"


def test_filter_fn():
    model = make(3)
    seen = []
    report = fastconv.patch(model, filter_fn=lambda name, module: seen.append((name, module)) or name == "1")
    assert [n for n, _ in seen] == ["0", "1", "2"]
    assert seen[2][1] is model[2]
    assert {s.name for s in report.sites} == {"1"}
    assert fast_blocks(model) == [model[1]]
    assert fastconv.patch(model).blocks == (3, 3)


def test_strict_changes_nothing_where_one_block_cannot_be_fused():
    model = nn.Sequential(make(), make(dilation=2))
    with pytest.raises(RuntimeError, match=r"1\.0 \(ConvNeXtBlock\): depthwise_conv_norm: the convolution must be undilated"):
        fastconv.patch(model, strict=True)
    assert not fast_blocks(model)
    with pytest.raises(RuntimeError, match="no block was recognised"):
        fastconv.patch(nn.Linear(2, 2), strict=True)
    assert fastconv.patch(make(), strict=True).blocks == (2, 2)


def test_strict_raises_where_a_call_falls_back():
    model = make()
    fastconv.patch(model, strict=True)
    step(model, images())
    model[0].conv_dw.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"strict=True.*depthwise_conv_norm in ConvNeXtBlock.*a hook sits on conv_dw"):
        model(images())
    with fastconv.disabled():
        model(images())


def test_partly_fused_block():
    """A block with a stride keeps its own convolution; its tail, with the shortcut's own module, is fused."""
    torch.manual_seed(0)
    plain = randomise_(timm.models.convnext.ConvNeXtBlock(8, 16, stride=2, ls_init_value=0.5, drop_path=0.3))
    model = copy.deepcopy(plain)
    report = fastconv.patch(model)
    assert [(s.op, s.status) for s in report.sites] == [(OPS[0], "declined"), (OPS[1], "fused"), (OPS[2], "fused")]
    assert report.blocks == (0, 1)
    results = []
    for m in (model, plain):
        torch.manual_seed(5)
        results.append(step(m, images(8)))
    assert_agree(*results)


def test_report_prints_a_plain_table():
    model = nn.Sequential(make(), make(dilation=2))
    report = fastconv.patch(model)
    model(images())
    lines = str(report).splitlines()
    assert lines[0] == "fastconv: 2 of 4 blocks fused"
    assert lines[1].split() == ["op", "block", "status", "backend", "sites", "reason"]
    assert any(line.split()[:5] == ["residual_scale", "ConvNeXtBlock", "fused", "cpu", "4"] for line in lines)
    assert any("undilated" in line and "(1.0 .. 1.1)" in line for line in lines)
    assert "channels_last" in lines[-1], "contiguous inputs were copied"
    assert str(fastconv.report(nn.Linear(1, 1))) == "fastconv: no block recognised"


def test_no_hint_in_channels_last():
    model, _ = pair()
    model(images().to(memory_format=torch.channels_last))
    assert "channels_last" not in str(fastconv.report(model))


def test_report_of_a_part():
    model, _ = pair()
    outer = nn.Sequential(model)
    assert {s.name for s in fastconv.report(outer).sites} == {"0.0", "0.1"}
    assert {s.name for s in fastconv.report(model[1]).sites} == {""}
    assert {s.name for s in fastconv.report(model).sites} == {"0", "1"}


def test_recognised_families_that_compute_something_else():
    with torch.device("meta"):
        model = timm.create_model("rdnet_tiny")
    report = fastconv.patch(model, ops=OPS)
    assert report.declined and not report.fused
    assert all("does not end in a residual sum" in s.reason for s in report.declined)
    assert not fast_blocks(model)


def test_verify():
    model, _ = pair(drop_path=0.5)
    model.train()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    result = fastconv.verify(model, images())
    assert result.ok, result.failures
    assert set(result.gradients) == {n for n, _ in model.named_parameters()}
    assert 0 < result.output < 1e-5
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("broken", ["depthwise_conv_norm_fwd", "depthwise_conv_norm_bwd", "residual_scale_bwd"])
def test_verify_finds_a_broken_kernel(broken, monkeypatch):
    model, _ = pair()
    right = _registry.raw

    def raw(name, backend):
        op = right(name, backend)
        return op if name != broken else lambda *args: tuple(t * 1.01 if t.is_floating_point() else t for t in op(*args))

    monkeypatch.setattr(_registry, "raw", raw)
    result = fastconv.verify(model, images())
    assert not result.ok
    assert ("outputs" in result.failures[0]) == broken.endswith("fwd")


def test_small_maps_leave_the_tail_to_torch(monkeypatch):
    monkeypatch.setitem(_registry.MIN_CPU_ELEMENTS, "residual_scale", 10**6)
    model, plain = pair(drop_path=0.3)
    results = []
    for m in (model, plain):
        torch.manual_seed(0)
        results.append(step(m, images(8)))
    assert_agree(*results)
    assert backends(model) == {"depthwise_conv_norm": "cpu", "residual_scale": "native", "gelu_linear": "cpu"}
    assert fastconv.report(model).blocks == (2, 2) and not any(s.fallbacks for s in fastconv.report(model).sites)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
    assert backends(model)["residual_scale"] == "cpu", "torch would convert y first"
