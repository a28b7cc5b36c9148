"""patch, unpatch and report through a model's life: options, fallbacks, wrappers, tracers, compilers."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
from patch_contract import assert_agree, fast_blocks, outputs_of, randomise_, relative, step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations, parametrize

import fastconv
from fastconv.ops import _registry
from fastconv.patching._block import _norm_dtype

OPS = ("depthwise_conv_norm", "residual_scale")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # tiny tensors: more threads only wait for each other


def make(blocks=2, drop_path=0.0, **kw):
    torch.manual_seed(0)
    kind = timm.models.convnext.ConvNeXtBlock
    return randomise_(nn.Sequential(*(kind(8, ls_init_value=0.5, drop_path=drop_path, **kw) for _ in range(blocks))))


def images(batch=2):
    return torch.randn(batch, 8, 7, 5, generator=torch.Generator().manual_seed(3))


def pair(**kw):
    plain = make(**kw)
    model = copy.deepcopy(plain)
    fastconv.patch(model)
    return model, plain


def backends(model):
    return {s.op: s.backend for s in fastconv.report(model).sites}


# --- what is asked for ---


def test_unknown_op_lists_the_known():
    with pytest.raises(ValueError, match="depthwise_conv_norm, residual_scale, got 'batch_norm'"):
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
    assert [(s.op, s.status) for s in report.sites] == [("depthwise_conv_norm", "declined"), ("residual_scale", "fused")]
    assert report.blocks == (0, 1)
    results = []
    for m in (model, plain):
        torch.manual_seed(5)
        results.append(step(m, images(8)))
    assert_agree(*results)


# --- fallbacks: counted, explained, warned about once ---


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


def test_half_model_with_float32_norms():
    model, plain = pair()
    for m in (model, plain):
        m.to(torch.bfloat16)
        for block in m:
            block.norm.float()
    with pytest.warns(RuntimeWarning, match="input, convolution and norm have different dtypes"):
        actual = model(images().bfloat16())
    assert torch.allclose(actual, plain(images().bfloat16()), rtol=2e-2, atol=2e-2)


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
        "print([s.backend for s in fastconv.report(m).sites])"
    )
    env = {**os.environ, "FASTCONV_DISABLE": "depthwise_conv_norm"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['eager', 'cpu']", done.stderr


def test_empty_batch_and_one_pixel():
    model, plain = pair()
    for shape in ((0, 8, 5, 4), (1, 8, 1, 1), (2, 8, 1, 9)):
        x = torch.randn(shape)
        actual, expected = outputs_of(model, x), outputs_of(plain, x)
        assert actual[0].shape == expected[0].shape
        assert torch.allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)


# --- the report ---


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


def test_recognised_families_without_a_rule():
    for name in ("csatv2", "rdnet_tiny", "maxxvit_rmlp_nano_rw_256"):
        with torch.device("meta"):
            model = timm.create_model(name)
        report = fastconv.patch(model)
        assert report.declined, name
        assert all(s.reason.startswith("rule not written yet") for s in report.declined)
        assert not fast_blocks(model)


# --- verify ---


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


# --- classes above ours, and below ---


def test_parametrized_before_and_after():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    for order in ("before", "after"):
        model, plain = make(), make()
        for m in (model, plain):
            if order == "after" and m is model:
                fastconv.patch(m)
            parametrize.register_parametrization(m[0], "gamma", Half())
            if order == "before" and m is model:
                assert fastconv.patch(m).blocks == (2, 2)
        assert_agree(step(model, images()), step(plain, images()))
        assert backends(model) == dict.fromkeys(OPS, "cpu")
        twin = copy.deepcopy(model)
        assert [s.backend for s in fastconv.report(twin).fused] == ["-"] * 4
        assert_agree(step(twin, images()), step(plain, images()))
        if order == "after":
            fastconv.unpatch(twin)
            assert parametrize.is_parametrized(twin[0])
            assert not fast_blocks(twin)
            assert_agree(step(twin, images()), step(plain, images()))
        for m in (model, plain):
            parametrize.remove_parametrizations(m[0], "gamma")
        assert type(model[0]) is type(model[1]), "removing it leaves the patched class"
        fastconv.unpatch(model)
        assert type(model[0]) is type(plain[0])
        assert_agree(step(model, images()), step(plain, images()))


def test_foreign_class_above_ours():
    model, _ = pair()

    class Above(type(model[0])):
        pass

    model[0].__class__ = Above
    with pytest.raises(RuntimeError, match="Above was put above the patched class ConvNeXtBlock"):
        fastconv.unpatch(model)
    assert len(fast_blocks(model)) == 2, "nothing was changed"


def test_spectral_norm_is_evaluated_once_a_call():
    """Its power iteration moves a buffer at each read of the weight, in a fused call and in one that falls back."""
    model, plain = pair()
    for m in (model, plain):
        torch.manual_seed(4)
        parametrizations.spectral_norm(m[0].conv_dw)
        m.train()
    for _ in range(2):
        assert_agree(step(model, images()), step(plain, images()))
    model[0].norm.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning):
        step(model, images())
    step(plain, images())
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patch first", "shard first"])
def test_fsdp2(order, one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, plain = make(), make()
    if order == "patch first":
        fastconv.patch(model)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "shard first":
        assert fastconv.patch(model).blocks == (2, 2)
    assert isinstance(model[0], FSDPModule)
    x = images()
    actual, expected = model(x), plain(x)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert relative(actual, expected) <= 1e-5
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative(a.grad.to_local(), b.grad) <= 1e-4, name
    assert backends(model) == dict.fromkeys(OPS, "cpu")
    fastconv.unpatch(model)
    assert isinstance(model[0], FSDPModule)
    assert not fast_blocks(model)
    assert relative(model(x), expected) <= 1e-6


def test_fsdp2_on_a_child_is_declined(one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = pair()
    fully_shard(model[0].conv_dw, mesh=init_device_mesh("cpu", (1,)))
    with pytest.warns(RuntimeWarning, match="conv_dw is a FSDPConv2d"):
        actual = model(images())
    assert relative(actual, plain(images())) <= 1e-5


def test_data_parallel_replica():
    model, plain = pair()
    block = model[0]
    replica = block._replicate_for_data_parallel()
    for name, module in block.named_children():
        child = module._replicate_for_data_parallel()
        for key, p in module._parameters.items():
            setattr(child, key, p.detach().clone())
        if name == "mlp":
            child = module
        replica._modules[name] = child
    replica.gamma = block.gamma.detach().clone()
    assert relative(replica(images()), plain[0](images())) <= 1e-5
    assert {s.backend for s in fastconv.report(block).sites} == {"cpu"}, "replicas count for their original"


# --- autocast ---


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_what_reads_the_norm_sees_what_it_would_have_seen(conv_mlp):
    norm = timm.layers.LayerNorm2d if conv_mlp else timm.layers.LayerNorm
    model, plain = pair(conv_mlp=conv_mlp, norm_layer=norm)
    seen = []
    for m in (model, plain):
        m[0].mlp.fc1.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
        m[1].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = model(images()), plain(images())
    assert seen[:2] == seen[2:]
    assert backends(model) == dict.fromkeys(OPS, "cpu")
    assert relative(actual, expected) < 1e-2


def test_norm_in_autocasts_dtype_only_where_nobody_sees_it():
    """Where autocast returns float32 from LayerNorm, a plain Linear may be handed its own dtype at once, and nothing else may."""

    class LoRA(nn.Linear):
        pass

    def dtype(block, device="cuda"):
        return _norm_dtype(block, block._fastconv.layout, device, torch.bfloat16)

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


# --- tracers and compilers ---


def test_exported_and_traced_graphs_are_plain():
    model, plain = pair()
    model.eval()
    x = images()
    expected = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        symbolic = torch.fx.symbolic_trace(model)
        exports = [torch.export.export(model, (x,), strict=strict) for strict in (False, True)]
    assert "fastconv" not in str(traced.inlined_graph)
    for graph in (symbolic.graph, *(e.graph for e in exports)):
        assert not any("fastconv" in str(n.target) for n in graph.nodes)
    for call in (traced, symbolic, *(e.module() for e in exports)):
        assert relative(call(x), expected) <= 1e-6


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def test_patch_after_compile(dynamo):
    kernels = []

    def capture(graph, _):
        kernels.append(sum("depthwise_conv_norm_fwd" in str(n.target) for n in graph.graph.nodes))
        return graph

    model, plain = make(), make()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    for change in (lambda _: None, fastconv.patch, fastconv.unpatch):
        change(model)
        with torch.no_grad():
            assert relative(compiled(images()), plain(images())) <= 1e-6
    assert kernels == [0, 2], "unpatched again, it takes up its first graph"


def test_regional_compile_makes_no_more_graphs_than_unpatched(dynamo):
    graphs = []
    for patched in (False, True):
        dynamo.reset()
        model = make(4)
        if patched:
            fastconv.patch(model)
        counter = dynamo.testing.CompileCounter()
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        for _ in range(3):
            model(images())
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0]


def test_hook_put_in_after_compile_runs(dynamo):
    model, plain = pair()
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    for m in (model, plain):
        m[0].norm.register_forward_hook(lambda _m, _a, out: 3 * out)
    with dynamo.config.patch(skip_nnmodule_hook_guards=False):
        dynamo.reset()
        assert relative(compiled(images()), plain(images())) <= 1e-5


def test_fallbacks_and_copies_are_not_counted_in_compiled_code(dynamo):
    """A counter would recompile at every call, a warning would break the graph."""
    model, plain = pair()
    for m in (model, plain):
        m[0].norm.register_forward_hook(lambda _m, _a, out: 3 * out)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", RuntimeWarning)
        first = compiled(images())
        with dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                assert torch.equal(compiled(images()), first)
    assert relative(first, plain(images())) <= 1e-5
    sites = fastconv.report(model).sites
    assert not any(s.fallbacks or s.copies for s in sites)
    assert {s.backend for s in sites} == {"-"}


def test_compile_autocast(dynamo):
    model, plain = pair()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = step(model, images(), compiled), step(plain, images())
    for a, b in zip((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < 3e-2


def test_disabled_and_forced_backends_reach_a_compiled_model(dynamo):
    model, plain = pair()
    kernels = []

    def capture(graph, _):
        kernels.append(sum("depthwise_conv_norm_fwd" in str(n.target) for n in graph.graph.nodes))
        return graph

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    with torch.no_grad():
        expected = plain(images())
        assert relative(compiled(images()), expected) <= 1e-5
        with fastconv.disabled():
            assert relative(compiled(images()), expected) <= 1e-6
        with fastconv.use_backend("eager"):
            assert relative(compiled(images()), expected) <= 1e-6
    assert kernels == [2, 0, 0]


def test_inductor_and_dynamic_sizes(dynamo):
    model, plain = pair(drop_path=0.3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        torch.manual_seed(0)
        actual = step(model.eval(), images(batch), compiled)
        assert_agree(actual, step(plain.eval(), images(batch)))
    step(model.train(), images(4), compiled)


def test_import_touches_nothing():
    code = (
        "import sys, fastconv; print([m for m in ('timm', 'torchvision', 'transformers') if m in sys.modules]);"
        "import timm; print(timm.models.convnext.ConvNeXtBlock.forward.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "timm.models.convnext"], done.stderr
