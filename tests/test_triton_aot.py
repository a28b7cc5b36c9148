"""Every Triton kernel, as its wrapper launches it, compiled ahead of time for sm_80 and sm_90: no stack, no spills.

They compile in a process of their own, because one that interprets kernels cannot compile them.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

DTYPES = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16"}
SCALARS = {float: "fp32", int: "i32"}
SIZES = {96: 56, 192: 28, 384: 14, 768: 7, 70: 33}  # C -> H = W: the stages of ConvNeXt at 224 x 224, and a ragged one
# depthwise_conv_norm launches the kernels of depthwise_conv too.
CHOSEN = [
    ("depthwise_conv_norm", 96, 7, "bfloat16"),
    ("depthwise_conv_norm", 768, 7, "float32"),
    ("depthwise_conv_norm", 192, 3, "float16"),
    ("depthwise_conv_norm", 70, 5, "bfloat16"),
    ("residual_scale", 96, 7, "bfloat16"),
    ("global_response_norm", 384, 7, "bfloat16"),
    ("gelu_linear", 96, 7, "float16"),
    ("squeeze_excite", 96, 7, "bfloat16"),
    ("grouped_conv", 192, 3, "bfloat16"),
    ("window_attention", 96, 7, "bfloat16"),
    ("window_attention", 192, 8, "float16"),
]
VARIANTS = [("depthwise_conv_norm", C, K, dtype) for C in SIZES for K in (3, 5, 7, 9) for dtype in ("float32", "bfloat16", "float16")]
VARIANTS += [("grouped_conv", C, K, dtype) for C in SIZES for K in (1, 3) for dtype in ("float32", "bfloat16", "float16")]
VARIANTS += [
    (op, C, 7, dtype)
    for op in ("residual_scale", "global_response_norm", "gelu_linear", "squeeze_excite")
    for C in SIZES
    for dtype in ("float32", "bfloat16", "float16")
]


# Heads of 32 channels. float32 and larger windows spill some: see its config().
VARIANTS += [("window_attention", C, K, dtype) for C in (96, 192, 768) for K in (7, 8) for dtype in ("bfloat16", "float16")]


def launches(op: str, C: int, K: int, dtype: str) -> list:
    """(kernel, arguments, keywords) of each launch of the op's fwd and bwd, recorded on meta tensors."""
    import torch
    import triton
    from fastconv.triton_kernels import (
        depthwise_conv,
        depthwise_conv_norm,
        gelu_linear,
        global_response_norm,
        grouped_conv,
        residual_scale,
        squeeze_excite,
        window_attention,
    )

    recorded = []
    triton.JITFunction.run = lambda self, *args, grid, warmup, **kwargs: recorded.append((self, args, kwargs))
    dtype = getattr(torch, dtype)
    x, vector = torch.empty(32, SIZES[C], SIZES[C] + 3 * (C == 70), C, dtype=dtype, device="meta"), torch.empty(C, device="meta")
    weight, nchw = torch.empty(C, 1, K, K, device="meta"), x.permute(0, 3, 1, 2)
    if op == "depthwise_conv":
        depthwise_conv.fwd(x, weight, vector, dtype)
        depthwise_conv.bwd(x, nchw, weight, True, True)
    elif op == "window_attention":  # V1 on whole windows; V2 with padding
        q, k, v = torch.empty(*x.shape[:3], 3, C // 32, 32, dtype=dtype, device="meta").unbind(3)
        table, scale = torch.empty((2 * K - 1) ** 2, C // 32, device="meta"), torch.empty(C // 32, device="meta")
        for others in ((None, None), (scale, torch.empty(3, C // 32, 32, dtype=dtype, device="meta"))):
            args = (q, k, v, table, *others, K, K, K // 2, K // 2, False, 32**-0.5, -100.0)
            window_attention.bwd(window_attention.fwd(*args), *args)
    elif op == "squeeze_excite":
        w1, w2 = torch.empty(8, C, device="meta"), torch.empty(C, 8, device="meta")
        one = x[:1]  # few programs: slices, and their sum in a kernel of its own
        for channels_last, gate in ((True, 6), (False, 7)):
            maps = one if channels_last else one.permute(0, 3, 1, 2).contiguous()
            y, *saved = squeeze_excite.fwd(maps, w1, None, w2, None, 1, gate, dtype, channels_last, True)
            given = nchw[:1] if channels_last else maps
            squeeze_excite.bwd(y, given, w1, w2, *saved, 1, gate, channels_last, True, True, True)
    elif op == "depthwise_conv_norm":
        y, z, mean, rstd = depthwise_conv_norm.fwd(x, weight, vector, vector, vector, 1e-6, dtype, dtype, True)
        for dshortcut in (None, x):
            depthwise_conv_norm.bwd(y, nchw, weight, vector, z, mean, rstd, dshortcut, True, True, True)
    elif op == "global_response_norm":
        y, norm = global_response_norm.fwd(x.flatten(1, 2), vector, vector, 1e-6, 1, dtype, True)
        global_response_norm.bwd(y, x.flatten(1, 2), vector, norm, 1e-6, 1, True, True)
    elif op == "grouped_conv":
        width = {70: 10, 96: 16, 192: 32, 384: 64, 768: 128}[C]
        weight, geometry = torch.empty(C, width, K, K, dtype=dtype, device="meta"), (1, 1, K // 2, K // 2, C // width, True)
        y = grouped_conv.fwd(x, weight, vector, *geometry, dtype).permute(0, 2, 3, 1)
        grouped_conv.bwd(y, nchw, weight, *geometry, True, True)
    elif op == "gelu_linear":
        gelu_linear.bwd(gelu_linear.fwd(x.flatten(), False, dtype), x.flatten(), False, True)
        gelu_linear.bwd(gelu_linear.fwd(x.flatten(), True, dtype), x.flatten(), True, True)
    else:
        shortcut, y, mask = x.float().flatten(1, 2), x.flatten(1, 2), torch.empty(32, device="meta")
        out = residual_scale.fwd(shortcut, y, vector, mask, torch.float32)
        residual_scale.bwd(out, y, vector, mask, True, True)
    return recorded


def resources(kernel, args, kwargs, arch: int) -> dict:
    """Registers, stack and spills of a kernel, specialised on its arguments as at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg") if name in kwargs}
    signature, constexprs, attrs = {}, {}, {}
    for i, (name, value) in enumerate({**dict(zip(kernel.arg_names, args)), **kwargs}.items()):
        if name in kwargs or value is None or value is True or value is False or (isinstance(value, int) and value == 1):
            signature[name], constexprs[name] = "constexpr", value
            continue
        signature[name] = DTYPES[str(value.dtype)] if hasattr(value, "dtype") else SCALARS[type(value)]
        if hasattr(value, "dtype") or (isinstance(value, int) and value % 16 == 0):
            attrs[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=GPUTarget("cuda", arch, 32), options=options)
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("STL", "LDL", "FFMA", "FSEL", "LDG", "BRA")}
    wide = len(re.findall(r"\bLDG\.E\S*\.(?:64|128)", sass))
    return {"kernel": kernel.__name__, "arch": arch, **found, **counts, "wide_loads": wide, "shared": compiled.metadata.shared}


def main(op: str, C: str, K: str, dtype: str, **overrides: int) -> None:
    for kernel, args, kwargs in launches(op, int(C), int(K), dtype):
        for arch in (80, 90):
            print(json.dumps(resources(kernel, args, kwargs | overrides, arch)), flush=True)


def compile_all(*variant, **overrides) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = f"import runpy; runpy.run_path({__file__!r})['main'](*{tuple(map(str, variant))!r}, **{overrides!r})"
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def spills(found: dict) -> bool:
    return any(found[name] != 0 for name in ("stack", "local", "STL", "LDL"))


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in CHOSEN else pytest.mark.slow, id="-".join(map(str, v))) for v in VARIANTS]
)
def test_no_kernel_spills(variant):
    pytest.importorskip("triton")
    compiled = compile_all(*variant)
    kernels = {found["kernel"] for found in compiled}
    expected = {f"{variant[0]}_fwd_kernel", f"{variant[0]}_bwd_kernel", "reduce_kernel"}
    if variant[0] == "squeeze_excite":
        expected = {f"squeeze_excite_{name}_kernel" for name in ("sum", "fold", "scale")}
    if variant[0] == "depthwise_conv_norm":
        expected |= {"depthwise_conv_fwd_kernel", "depthwise_conv_wgrad_kernel"}
    elif variant[0] == "global_response_norm":
        expected |= {f"{variant[0]}_{part}_kernel" for part in ("sum", "fwd_sums", "bwd_sums")}
    elif variant[0] in ("gelu_linear", "grouped_conv"):
        expected.remove("reduce_kernel")
    elif variant[0] == "window_attention":
        expected.add("window_attention_fold_kernel")
    assert kernels == expected
    narrow = ("_sums_kernel", "_fold_kernel")  # those read kilobytes
    if variant[0] == "window_attention":
        narrow += ("reduce_kernel",)  # rows of N * N values, an odd number for windows of 7
    ragged = variant[0] == "squeeze_excite" and SIZES[variant[1]] ** 2 % 16 != 0  # planes of NCHW, that begin at any element
    for found in compiled:
        print(found)
        assert not spills(found), found
        same = [other["wide_loads"] for other in compiled if (other["kernel"], other["arch"]) == (found["kernel"], found["arch"])]
        if variant[1] % 8 == 0 and not found["kernel"].endswith(narrow):
            assert (max(same) if ragged else found["wide_loads"]) > 0, found


def test_the_gate_sees_spills():
    pytest.importorskip("triton")
    compiled = compile_all("residual_scale", 96, 7, "float32", maxnreg=16)
    assert any(spills(found) for found in compiled), compiled


def test_importing_fastconv_imports_no_triton():
    script = """
import sys, torch
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:  # torch may have imported it
    del sys.modules[name]
sys.modules["triton"] = None  # from here on, importing it fails
import fastconv
fastconv.ops.depthwise_conv(torch.ones(1, 2, 3, 4), torch.ones(4, 1, 3, 3))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
