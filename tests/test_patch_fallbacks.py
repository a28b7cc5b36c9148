"""Calls that a patched block hands to the original code: counted, explained, warned about once."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from patch_helpers import assert_agree, outputs_of, step
from patch_small import OPS, backends, images, make, pair
from torch import nn

import fastconv

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_warning_a_model_and_reason():
    model = make(3)
    fastconv.patch(model)
    for block in model:
        block.norm.register_forward_pre_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            model(images())
        copy.deepcopy(model)(images())
    assert len(caught) == 2, "one for the model and one for its copy"
    assert "a hook sits on norm" in str(caught[0].message)
    report = fastconv.report(model)
    assert [dict(s.fallbacks) for s in report.sites if s.op == OPS[0]] == [{"a hook sits on norm": 4}] * 3
    assert "ran the original code in 12 calls: a hook sits on norm" in str(report)


def _swap_conv(block):
    class Conv(nn.Conv2d):
        pass

    block.conv_dw.__class__ = Conv


def _wrap_conv(block):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) * 1.5

    block.conv_dw = Adapter(block.conv_dw)


def _own_forward(block):
    inner = block.norm.forward
    block.norm.forward = lambda x: 2 * inner(x)


def _full_backward_hook(block):
    block.conv_dw.register_full_backward_hook(lambda *_: None)


def _old_weight_norm(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(block.conv_dw)


def _compiled_child(block):
    block.norm.compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swap_conv, "conv_dw is a Conv, not a Conv2d"),
        (_wrap_conv, "conv_dw is a Adapter, not a Conv2d"),
        (_own_forward, "the forward of norm is replaced on the instance"),
        (_full_backward_hook, "a hook sits on conv_dw"),
        (_old_weight_norm, "a hook sits on conv_dw"),
        (_compiled_child, "norm is compiled on its own"),
    ],
)
def test_child_changed_after_patch(change, reason):
    model, plain = pair()
    for m in (model, plain):
        change(m[0])
    with pytest.warns(RuntimeWarning, match=reason):
        actual = step(model, images())
    expected = step(plain, images())
    assert_agree(actual, expected)
    counted = [s.fallbacks for s in fastconv.report(model).sites if s.name == "0" and s.op == OPS[0]]
    assert counted == [{reason: 1}]


def test_global_hook():
    model, plain = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        with pytest.warns(RuntimeWarning, match="a global module hook"):
            actual = step(model, images())
        called, seen[:] = list(seen), []
        expected = step(plain, images())
    finally:
        handle.remove()
    assert called == seen
    assert_agree(actual, expected)


def test_adapter_on_what_is_not_fused_away():
    """A LoRA on a pointwise layer runs inside the fused block."""

    class LoRA(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)

    model, plain = pair()
    for m in (model, plain):
        m[0].mlp.fc1.__class__ = LoRA
    assert_agree(step(model, images()), step(plain, images()))
    assert backends(model) == dict.fromkeys(OPS, "cpu")


def test_tensor_subclass_meta_and_keyword():
    class Tagged(torch.Tensor):
        pass

    model, plain = pair()
    x = images()
    with pytest.warns(RuntimeWarning, match="the input is a Tagged"):
        assert type(model(x.as_subclass(Tagged))) is Tagged
    with pytest.warns(RuntimeWarning, match="other arguments than one tensor"):
        assert torch.equal(model[0](x=x), plain[0](x))
    with pytest.warns(RuntimeWarning, match="no kernels for device type meta"):
        assert model.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize(
    "bad",
    [
        images().half(),
        images().double(),
        images().long(),
        images()[:, :4],
        images()[0, 0],
        images().to("meta"),
    ],
    ids=["half", "double", "long", "channels", "dims", "device"],
)
def test_bad_input_raises_torchs_own_error(bad):
    model, plain = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as expected:
            plain(bad)
        with pytest.raises(expected.type) as actual:
            model(bad)
    assert str(actual.value) == str(expected.value)


def test_functorch_transforms_take_the_original_path():
    model, plain = pair()
    x = images(3)
    parameters = dict(model.named_parameters())

    def loss(parameters, image, module):
        return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    with pytest.warns(RuntimeWarning, match="torch.func"):
        actual = per_sample(parameters, x, model)
    expected = per_sample(dict(plain.named_parameters()), x, plain)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert all(s.fallbacks for s in fastconv.report(model).sites)
    doubled = {n: 2 * p for n, p in parameters.items()}
    assert_agree(
        ([torch.func.functional_call(model, doubled, (x,))], {}), ([torch.func.functional_call(plain, doubled, (x,))], {})
    )  # not a transform: fused
    assert backends(model) == dict.fromkeys(OPS, "cpu")


def test_double_backward_names_the_remedy():
    model, _ = pair()
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastconv\.disabled\(\)"):
        g.sum().backward()
    with fastconv.disabled():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.sum().backward()


def test_backend_eager_and_fastconv_disable_are_not_warned_about():
    model, plain = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastconv.use_backend("eager"):
            assert torch.equal(model(images()), plain(images()))
    assert backends(model) == dict.fromkeys(OPS, "eager")
    assert not any(s.fallbacks for s in fastconv.report(model).sites)
    code = (
        "import torch, timm, fastconv, warnings; warnings.simplefilter('error');"
        "m = torch.nn.Sequential(timm.models.convnext.ConvNeXtBlock(8, drop_path=.5)); fastconv.patch(m); m(torch.ones(2, 8, 5, 5));"
        "print([s.backend for s in fastconv.report(m).fused])"
    )
    env = {**os.environ, "FASTCONV_DISABLE": "depthwise_conv_norm, gelu_linear"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['eager', 'native', 'eager']", done.stderr


def test_empty_batch_and_one_pixel():
    model, plain = pair()
    for shape in ((0, 8, 5, 4), (1, 8, 1, 1), (2, 8, 1, 9)):
        x = torch.randn(shape)
        actual, expected = outputs_of(model, x), outputs_of(plain, x)
        assert actual[0].shape == expected[0].shape
        assert torch.allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)
