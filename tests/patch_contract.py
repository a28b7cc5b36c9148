"""What `fastconv.patch` promises, as tests that any model can be put through: subclass PatchContract and say how to make it."""

import copy
import functools
import io
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from patch_helpers import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    assert_agree,
    direction,
    fast_blocks,
    outputs_of,
    part,
    randomise_,
    relative,
    step,
    twins,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv.patching._module import child_at

HEAD_AND_TAIL = ("depthwise_conv_norm", "residual_scale")
V1 = (*HEAD_AND_TAIL, "gelu_linear")
V2 = (*HEAD_AND_TAIL, "global_response_norm")


def ddp_worker(rank, world_size, folder):
    """One process of test_ddp: the gradients of its share of the batch, averaged with the other's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    model, x = torch.load(f"{folder}/model.pt", weights_only=False)
    assert not fast_blocks(model), "a model that was pickled into a worker is a plain one"
    fastconv.patch(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    share = x.chunk(world_size)[rank]
    whole = sum((t.double() * direction(x.new_empty(len(x), *t.shape[1:])).chunk(world_size)[rank]).sum() for t in outputs_of(ddp, share))
    (whole * world_size).backward()  # DDP takes the mean of the ranks
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/gradients.pt")
    dist.destroy_process_group()


LOADS_WITHOUT_FASTCONV = """
import sys, torch
sys.modules["fastconv"] = None
model, x, expected = torch.load(sys.argv[1], weights_only=False)
assert not any(name.startswith("fastconv") and sys.modules[name] for name in sys.modules)
from torch.utils._pytree import tree_leaves
actual = [t for t in tree_leaves(model(x)) if isinstance(t, torch.Tensor)]
assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(actual, expected, strict=True))
print(sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}))
"""


@pytest.mark.usefixtures("one_thread")
class SingleProcessContract:
    """Subclass as TestX with `blocks` and `make`. The model must be small: it is run, copied and compiled many times."""

    blocks: int
    whole = True  # whether every op has its place in every block
    ops = V1
    compiled_ops = ("depthwise_conv_norm",)  # those that stay ours under torch.compile
    parts = ("conv", "norm")  # names in the layout, of children with parameters that are fused away

    def make(self, drop_path: float = 0.0) -> nn.Module:
        raise NotImplementedError

    def images(self, batch=2):
        return torch.randn(batch, 3, 64, 40, generator=torch.Generator().manual_seed(2))

    def build(self, drop_path=0.0, seed=0):
        torch.manual_seed(0)
        return randomise_(self.make(drop_path), seed).train()

    def pair(self, drop_path=0.0):
        plain = self.build(drop_path)
        model = copy.deepcopy(plain)
        report = fastconv.patch(model)
        assert report.blocks == (self.blocks if self.whole else 0, self.blocks), str(report)
        return model, plain

    def truth(self, plain):
        with torch.autocast("cpu", enabled=False):
            return step(copy.deepcopy(plain).double(), self.images().double())

    def test_every_block_runs_fused(self):
        model, _ = self.pair(drop_path=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, self.images())
        report = fastconv.report(model)
        assert {s.op for s in report.fused} == set(self.ops)
        assert {s.backend for s in report.fused} == {"cpu"}
        assert not any(s.fallbacks for s in report.sites)

    def test_agrees_in_float32(self):
        model, plain = self.pair()
        x = self.images()
        assert_agree(step(model, x), step(plain, x), self.truth(plain))

    def test_agrees_in_channels_last(self):
        model, plain = (m.to(memory_format=torch.channels_last) for m in self.pair())
        strides = {}
        for key, m in (("patched", model), ("plain", plain)):
            for name, module in m.named_modules():
                if type(module).__name__ == self.block_name(model):
                    module.register_forward_hook(lambda _m, _a, out, at=(key, name): strides.__setitem__(at, tree_leaves(out)[0].stride()))
        x = self.images().to(memory_format=torch.channels_last)
        assert_agree(step(model, x), step(plain, x))
        names = {name for _, name in strides}
        assert len(names) == self.blocks
        assert all(strides["patched", n] == strides["plain", n] for n in names)
        assert not any(s.copies for s in fastconv.report(model).sites)

    def block_name(self, model):
        return type(fast_blocks(model)[0]).__name__

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_agrees_under_autocast(self, dtype):
        model, plain = self.pair(drop_path=0.3)
        x = self.images()
        dtypes = {}
        block_name = self.block_name(model)
        for key, m in (("patched", model), ("plain", plain)):
            for name, module in m.named_modules():
                if type(module).__name__ == block_name:
                    module.register_forward_hook(lambda _m, _a, out, at=(key, name): dtypes.__setitem__(at, tree_leaves(out)[0].dtype))
        model.eval(), plain.eval()
        truth = self.truth(plain)
        with torch.autocast("cpu", dtype=dtype):
            actual, expected = step(model, x), step(plain, x)
        assert_agree(actual, expected, truth, dtype)
        assert len(dtypes) == 2 * self.blocks
        for key, name in dtypes:
            assert dtypes[key, name] == dtypes["plain", name], f"{key} {name}"
        assert not any(s.fallbacks for s in fastconv.report(model).sites)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_agrees_in_the_dtype_of_the_model(self, dtype):
        model, plain = (m.to(dtype) for m in self.pair())
        x = self.images().to(dtype)
        assert_agree(step(model, x), step(plain, x), self.truth(plain), dtype)
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}

    def test_random_stream_stays_the_models(self):
        model, plain = self.pair(drop_path=0.3)
        x = self.images(batch=12)
        states, results = [], []
        for m in (model, plain):
            torch.manual_seed(7)
            results.append([step(m, x) for _ in range(2)][-1])
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        assert_agree(*results)
        torch.manual_seed(8)
        assert relative(step(plain, x)[0][0], results[1][0][0]) > 1e-2, "drop path drops nothing here"

    def test_state_dict_and_optimizer_stay(self):
        model, plain = self.build(), self.build()
        before = {n: p.data_ptr() for n, p in model.named_parameters()}
        optimizer, plain_optimizer = (torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, plain))
        fastconv.patch(model)
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
        assert list(model.state_dict()) == list(plain.state_dict())
        for m, o in ((model, optimizer), (plain, plain_optimizer)):
            step(m, self.images())
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            o.step()
        plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        plain.load_state_dict(model.state_dict())
        for m, o in ((model, optimizer), (plain, plain_optimizer)):
            step(m, self.images())
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            o.step()
        for (n, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert relative(a.detach(), b.detach()) <= GRADIENT_TOLERANCE, n
            assert (
                relative(optimizer.state[a]["momentum_buffer"], plain_optimizer.state[b]["momentum_buffer"]) <= 10 * GRADIENT_TOLERANCE
            ), n

    def test_patch_is_idempotent(self):
        model, _ = self.pair()
        classes = [type(m) for m in model.modules()]
        step(model, self.images())
        again = fastconv.patch(model)
        assert [type(m) for m in model.modules()] == classes
        assert again.blocks == (self.blocks if self.whole else 0, self.blocks)
        assert {s.backend for s in again.fused} == {"cpu"}, "counters survive"

    def test_deepcopy(self):
        model, plain = self.pair()
        step(model, self.images())
        twin = copy.deepcopy(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert {s.backend for s in fastconv.report(twin).fused} == {"-"}, "counters start anew"
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.1)
            for p in plain.parameters():
                p.mul_(1.1)
        assert_agree(step(twin, self.images()), step(plain, self.images()))
        assert {s.backend for s in fastconv.report(twin).fused} == {"cpu"}

    def test_nothing_of_ours_in_a_module_dict(self):
        model, plain = self.pair()
        step(model, self.images())
        model.zero_grad(set_to_none=True)
        for (name, a), b in zip(model.named_modules(), plain.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys(), name
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert b"fastconv" not in buffer.getvalue()

    def test_compile_fullgraph(self):
        model, plain = self.pair(drop_path=0.3)
        names = []

        def capture(graph, _):
            names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=capture, bw_compiler=capture), fullgraph=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        x = self.images()
        model.eval(), plain.eval()
        assert_agree(step(model, x, compiled), step(plain, x))
        model.train()
        before = copy.deepcopy(model.state_dict())
        step(model, x, compiled)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(20):
                step(model, x, compiled)
                optimizer.step()
        assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
        for raw in (f"{op}_{way}" for op in self.compiled_ops for way in ("fwd", "bwd")):
            assert sum(raw in n for n in names) == 2 * self.blocks, raw  # eval and train graph
        torch._dynamo.reset()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        model, _ = self.pair(drop_path=0.5)
        x = self.images(batch=4)
        torch.manual_seed(3)
        expected = step(model, x)
        for block in fast_blocks(model):
            inner = block.forward
            block.forward = lambda *args, f=inner, **kw: checkpoint(functools.partial(f, **kw), *args, use_reentrant=reentrant)
        torch.manual_seed(3)
        actual = step(model, x)
        for a, b in zip((*actual[0], *actual[1].values()), (*expected[0], *expected[1].values()), strict=True):
            assert relative(a, b) <= 1e-6  # not bit for bit: gradients may meet in other strides

    def test_inference_mode_and_no_grad(self):
        model, plain = self.pair()
        model.eval(), plain.eval()
        x = self.images()
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                for a, b in zip(outputs_of(model, x), outputs_of(plain, x), strict=True):
                    assert not a.requires_grad
                    assert relative(a, b) <= OUTPUT_TOLERANCE
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}

    @pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=("first", "second", "both"))
    def test_frozen_parameters(self, which):
        parts = [self.parts[i] for i in which]
        model, plain = self.pair()
        for m, n in zip(fast_blocks(model), twins(model, plain), strict=True):
            for name in parts:
                part(m, name).requires_grad_(False)
                child_at(n, getattr(m._fastconv.layout, name, name)).requires_grad_(False)
        actual, expected = step(model, self.images()), step(plain, self.images())
        assert len(actual[1]) < len(list(model.parameters()))
        assert_agree(actual, expected)

    def test_parametrized_weights(self):
        model, plain = self.pair()
        for m, n in zip(fast_blocks(model), twins(model, plain), strict=True):
            layout = m._fastconv.layout
            for block in (m, n):
                weight_norm(child_at(block, getattr(layout, self.parts[0], self.parts[0])))
                parametrize.register_parametrization(child_at(block, getattr(layout, self.parts[1], self.parts[1])), "weight", _Doubled())
                if getattr(layout, "gamma", ""):
                    parametrize.register_parametrization(block, layout.gamma, _Doubled())
        actual = step(model, self.images())
        assert_agree(actual, step(plain, self.images()))
        assert any("parametrizations" in n for n in actual[1])
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}
        fastconv.unpatch(model)
        assert not fast_blocks(model)
        for a, b in zip(outputs_of(model, self.images()), outputs_of(plain, self.images()), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("index", [0, 1], ids=("first", "second"))
    def test_hooks_on_inner_modules_are_declined(self, index):
        model, plain = self.pair()
        name = self.parts[index]
        fired = []
        block = fast_blocks(model)[0]
        handle = part(block, name).register_forward_hook(lambda *_: fired.append(1))
        with pytest.warns(RuntimeWarning, match="a hook sits on"):
            actual = step(model, self.images())
        assert fired == [1]
        assert_agree(actual, step(plain, self.images()))
        declined = [s for s in fastconv.report(model).sites if s.fallbacks]
        assert len({s.name for s in declined}) == 1
        assert next(iter(declined[0].fallbacks.values())) == 1
        handle.remove()
        step(model, self.images())
        assert fired == [1]
        assert {s.backend for s in fastconv.report(model).fused} == {"cpu"}

    def test_disabled_runs_the_original_uncounted(self):
        model, plain = self.pair()
        with fastconv.disabled():
            actual = step(model, self.images())
        expected = step(plain, self.images())
        assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
        assert {s.backend for s in fastconv.report(model).sites} == {"-"}

    def test_unpatch_is_exact(self):
        model, plain = self.pair()
        step(model, self.images())
        assert fastconv.unpatch(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        actual, expected = step(model, self.images()), step(plain, self.images())
        assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
        assert all(torch.equal(g, expected[1][n]) for n, g in actual[1].items())
        assert fastconv.report(model).blocks == (0, self.blocks)


class PatchContract(SingleProcessContract):
    """With what takes other processes too; for one model of each library."""

    def test_saved_model_loads_without_fastconv(self, tmp_path):
        model, plain = self.pair()
        model.eval()
        x = self.images()
        with torch.no_grad():
            torch.save((model, x, outputs_of(model, x)), tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)[0]
        assert [type(m) for m in loaded.modules()] == [type(m) for m in plain.modules()]
        assert fastconv.report(loaded).blocks == (0, self.blocks)
        assert {s.reason for s in fastconv.report(loaded).declined} == {"not patched: call fastconv.patch(model)"}
        tests = str(pathlib.Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", LOADS_WITHOUT_FASTCONV, str(tmp_path / "model.pt")],
            env={**os.environ, "PYTHONPATH": tests},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert f".{self.block_name(model)}'" in done.stdout

    def test_ddp(self, tmp_path):
        plain = self.build().eval()
        x = self.images(batch=4)
        torch.save((fastconv.patch(plain) and plain, x), tmp_path / "model.pt")
        mp.spawn(ddp_worker, (2, str(tmp_path)), nprocs=2)
        actual = torch.load(tmp_path / "gradients.pt")
        _, expected = step(fastconv.unpatch(plain), x)
        expected.pop("input")
        assert_agree(([], actual), ([], expected))


class _Doubled(nn.Module):
    def forward(self, x):
        return 2 * x
