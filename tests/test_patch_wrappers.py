"""Patched blocks under classes and wrappers of others: parametrizations, FSDP2, DataParallel."""

import copy

import pytest
import torch
import torch.distributed as dist
from patch_helpers import assert_agree, fast_blocks, relative, step
from patch_small import OPS, backends, images, make, pair
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastconv

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert [s.backend for s in fastconv.report(twin).fused] == ["-"] * 2 * len(OPS)
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
