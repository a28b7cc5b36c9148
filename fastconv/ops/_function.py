"""What every autograd.Function of the package shares.

All have the form forward(ctx, ...). With setup_context torch inspects the signature at each call, which takes 20 us, and 100
to 200 in a training step, where the caches are cold. torch.func, which needs setup_context, never gets here: `select` sends
its calls to the reference.
"""

from __future__ import annotations

import functools

import torch


class _SecondDerivative(torch.autograd.Function):
    """Identity on the first `count` tensors; its backward raises. The others are what those were computed from."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tensors[:count]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def first_order_only(op: str):
    """Decorate a Function's backward(ctx, saved_tensors, *grads): a second derivative raises an error that names the remedy.

    Asking for create_graph=True is fine as long as nobody differentiates through the gradients of this op. Unlike
    torch's `once_differentiable`, the results stay connected to what they were computed from: torch.autograd.grad with
    respect to an input finds the path and raises, where it would otherwise leave the term out in silence.
    """
    message = (
        f"{op}: second derivatives are not implemented by the fused kernels; "
        "compute them inside `with fastconv.disabled():`, which runs the original code"
    )

    def decorate(backward):
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            saved = ctx.saved_tensors  # read once: a checkpointed region hands them out only once
            if torch.compiler.is_compiling():
                return backward(ctx, saved, *grads)
            with torch.no_grad():
                outputs = backward(ctx, saved, *grads)
            sources = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
            present = [o for o in outputs if o is not None]
            if not torch.is_grad_enabled() or not sources or not present:
                return outputs
            raising = iter(_SecondDerivative.apply(message, len(present), *present, *sources))
            return tuple(None if o is None else next(raising) for o in outputs)

        return wrapper

    return decorate


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want a backward of an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def constant_when_traced(function):
    """Have torch.compile call `function` while it traces and keep the result: torch.compiler.assume_constant_result, which
    sets this attribute, imports the whole compiler first, ten times the time that `import fastconv` takes without it."""
    function._dynamo_marked_constant = True
    return function
