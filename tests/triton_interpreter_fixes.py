"""Make Triton's interpreter a faithful judge of a kernel: exact bfloat16, and every address checked.

As of Triton 3.9 the interpreter truncates float32 to bfloat16, computes on bfloat16's bit patterns as if they were
integers, refuses masks that mix scalars and blocks, and reads or writes out of bounds without a word.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle

_allowed = np.empty((0, 2), np.uint64)  # [first, past the last) address of each tensor argument of the running kernel
accesses: list[tuple[np.ndarray, int]] | None = (
    None  # addresses of the elements that loads and stores touch, and their size, while it is a list
)


def float_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def span(tensor) -> int:
    """Elements from the first of a tensor to past its last, whatever its strides."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0


def check_addresses(pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
    addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64).ravel()
    if accesses is not None:
        accesses.append((addresses, size))
    inside = (addresses[:, None] >= _allowed[:, 0]) & (addresses[:, None] + np.uint64(size) <= _allowed[:, 1])
    if not inside.any(1).all():
        raise IndexError(f"{what} outside of every tensor argument: {int((~inside.any(1)).sum())} of {addresses.size} lanes")


def _wrap(owner, name: str):
    def decorate(make):
        setattr(owner, name, make(getattr(owner, name)))

    return decorate


def install() -> None:
    """Patch the interpreter of this process; TRITON_INTERPRET=1 must have been set before triton was imported."""

    @_wrap(InterpreterBuilder, "cast_impl")
    def _(original):
        def cast_impl(self, source, dtype):
            before, after = source.dtype.scalar, dtype.scalar
            if after == tl.bfloat16 and before != tl.bfloat16:
                return TensorHandle(float_to_bf16(source.data.astype(np.float32)), after)
            if before == tl.bfloat16 and after != tl.bfloat16:
                return TensorHandle(bf16_to_float(source.data).astype(interpreter._get_np_dtype(dtype)), after)
            return original(self, source, dtype)

        return cast_impl

    @_wrap(InterpreterBuilder, "create_fp_to_fp")
    def _(original):
        def create_fp_to_fp(self, source, dtype, rounding):
            if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
                return self.cast_impl(source, dtype)
            return original(self, source, dtype, rounding)

        return create_fp_to_fp

    @_wrap(InterpreterBuilder, "create_dot")
    def _(original):
        def create_dot(self, a, b, *args):
            a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
            return original(self, a, b, *args)

        return create_dot

    def refuse_bf16(original):
        def operation(self, *args):
            if args[-1] is not np.where and any(isinstance(a, TensorHandle) and a.dtype.scalar == tl.bfloat16 for a in args):
                raise TypeError("bfloat16 arithmetic: convert to float32 right after the load")
            return original(self, *args)

        return operation

    for name in ("unary_op", "binary_op", "ternary_op"):
        _wrap(InterpreterBuilder, name)(refuse_bf16)

    @_wrap(ReduceOps, "apply_impl")
    def _(original):
        def apply_impl(self, inputs):
            if inputs[0].dtype.scalar == tl.bfloat16:
                raise TypeError("bfloat16 reduction: convert to float32 right after the load")
            return original(self, inputs)

        return apply_impl

    @_wrap(InterpreterBuilder, "create_dot")
    def _(original):
        def create_dot(self, a, b, *args):
            """Products of halves are exact in float32, in which a GPU adds them up too."""
            return original(self, *(self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)), *args)

        return create_dot

    @_wrap(InterpreterBuilder, "create_masked_load")
    def _(original):
        def create_masked_load(self, pointers, mask, other, *args):
            mask = TensorHandle(mask.data.astype(bool), tl.int1)
            check_addresses(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, "load")
            return original(self, pointers, mask, other, *args)

        return create_masked_load

    @_wrap(InterpreterBuilder, "create_masked_store")
    def _(original):
        def create_masked_store(self, pointers, value, mask, *args):
            mask = TensorHandle(mask.data.astype(bool), tl.int1)
            check_addresses(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8, "store")
            return original(self, pointers, value, mask, *args)

        return create_masked_store

    @_wrap(GridExecutor, "__call__")
    def _(original):
        def __call__(self, *args, **kwargs):
            global _allowed
            tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "data_ptr")]
            _allowed = np.array([(t.data_ptr(), t.data_ptr() + span(t) * t.element_size()) for t in tensors], np.uint64)
            with np.errstate(all="ignore"):
                return original(self, *args, **kwargs)

        return __call__
