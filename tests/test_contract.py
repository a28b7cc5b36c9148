"""What every op and every file of the repository must have; the rules of the house, by reading the source."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastconv import _library, ops, use_backend
from fastconv.ops._registry import BACKENDS, NAMESPACES, OPS, hub
from fastconv.testing import CASES, RawCalls, make_inputs, run

ROOT = pathlib.Path(__file__).parent.parent
every_op = pytest.mark.parametrize("op", sorted(OPS))


def imports(path: pathlib.Path, package: str) -> set[str]:
    """Absolute names of all that a file imports, at any depth of its code; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[pathlib.Path]:
    found = sorted((ROOT / folder).glob("**/*.py"))
    assert found, folder
    return found


def of(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize(
    "folder, package, banned",
    (
        (
            "fastconv/models",
            "fastconv.models",
            ("fastconv.ops", "fastconv.patching", "fastconv.testing", "fastconv.triton_kernels", "fastconv._library"),
        ),
        ("fastconv/ops", "fastconv.ops", ("fastconv.patching", "fastconv.models", "fastconv.testing", "fastconv.cli")),
        ("fastconv/patching", "fastconv.patching", ("fastconv.triton_kernels", "fastconv._library", "fastconv._C", "triton")),
        ("triton_kernels", "fastconv.triton_kernels", ("fastconv.ops", "fastconv.patching", "fastconv.models", "fastconv.testing")),
    ),
)
def test_import_rules(folder, package, banned):
    for path in files(folder):
        nested = path.relative_to(ROOT / folder).parent.parts
        bad = of(imports(path, ".".join((package, *nested))), *banned)
        assert not bad, f"{path.relative_to(ROOT)} imports {sorted(bad)}"


def test_model_files_are_plain_pytorch():
    for path in files("fastconv/models"):
        if path.name != "__init__.py":
            bad = of(imports(path, "fastconv.models"), "fastconv", "timm", "torchvision", "transformers") - of(
                imports(path, "fastconv.models"), "fastconv.models"
            )
            assert not bad, f"{path.name} imports {sorted(bad)}"


def test_the_import_reader_reads():
    """The rules above would pass on a reader that finds nothing."""
    found = imports(ROOT / "fastconv/ops/residual_scale.py", "fastconv.ops")
    assert {"torch", "fastconv.ops._registry", "fastconv.ops._function.needs_grad"} <= found
    assert "fastconv._library" in imports(ROOT / "fastconv/ops/_registry.py", "fastconv.ops")


def loaded(code: str) -> set[str]:
    result = subprocess.run([sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_is_light():
    """`import fastconv` brings its own modules and torch's (whose flop counter looks for Triton), nothing else.

    Kernel modules load at their first use.
    """
    brought = loaded("import torch, fastconv") - loaded("import torch, torch.utils.flop_counter")
    assert "fastconv.ops" in brought
    assert not of(brought, "triton", "timm", "torchvision", "transformers", "typer", "rich", "sklearn", "matplotlib")
    assert not of(brought, "torch._dynamo", "torch._inductor")  # 0.7 s
    assert not of(brought, "fastconv.triton_kernels", "fastconv.testing", "fastconv.cli")


def test_no_library_of_models_is_imported_at_the_top():
    for path in files("fastconv"):
        if "demo" in path.parts:
            continue
        top = ast.Module([node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        names = {a.name for node in top.body for a in node.names if isinstance(node, ast.Import)} | {
            node.module for node in top.body if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not of(names, "triton", "timm", "torchvision", "transformers"), path


@every_op
def test_an_op_is_whole(op):
    module = hub(op)
    assert op == module.OP
    public = getattr(ops, op)
    function = getattr(ops, "".join(part.title() for part in op.split("_")))
    assert issubclass(function, torch.autograd.Function)
    assert "setup_context" not in vars(function)  # 20 us a call, see ops/_function.py
    assert {op, function.__name__} <= set(ops.__all__)
    for word in ("Args:", "Returns:", "Raises:", "Deterministic:", "Source:", "float32 | bfloat16 | float16", "ValueError", "TypeError"):
        assert word in public.__doc__, word
    # reference, eager backend and public function take the same arguments, tensors in the order of the test inputs
    parameters = list(inspect.signature(public).parameters)
    tensors = list(make_inputs(CASES[op][0], torch.float32).tensors)
    others = list(inspect.signature(module.reference).parameters)
    assert [name for name in parameters if name in tensors] == tensors == [name for name in others if name in tensors]
    assert parameters[0] == tensors[0] == others[0]
    assert len(CASES[op]) >= 20 and all(case.op == op for case in CASES[op])
    assert len({str(case) for case in CASES[op]}) == len(CASES[op])
    assert {f"{op}_fwd", f"{op}_bwd"} <= module.SCHEMAS.keys()


@every_op
def test_every_raw_op_has_schema_fake_and_kernels(op):
    for backend in OPS[op]:
        namespace = NAMESPACES[backend]
        for name in hub(op).SCHEMAS:
            qualified = f"{namespace}::{name}"
            if backend == "cuda" and _library.cuda_missing:  # a machine without nvcc; where it is, test_cuda_build.py demands the library
                continue
            assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta"), f"{qualified} has no fake kernel"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA" if backend == "triton" else backend.upper()), qualified
            schema = getattr(getattr(torch.ops, namespace), name).default._schema
            written = [argument.name for argument in schema.arguments if argument.alias_info]
            assert written == (["dy"] if name == "gelu_linear_bwd" else []), f"{qualified} is not functional"
            assert not any(result.alias_info for result in schema.returns), f"{qualified} returns an argument"


@every_op
def test_an_op_has_its_files(op):
    assert set(OPS[op]) <= set(BACKENDS)
    sources = {"cpu": f"csrc/cpu/{op}.cpp", "cuda": f"csrc/cuda/{op}.cpp", "triton": f"triton_kernels/{op}.py"}
    for backend, path in sources.items():
        assert (ROOT / path).exists() == (backend in OPS[op]), path
    assert "def test" in (ROOT / f"benchmarks/bench_{op}.py").read_text()
    assert re.search(rf"[\"']{op}[\"']", (ROOT / "tests/test_triton_aot.py").read_text()), "no ahead-of-time entry"


@every_op
def test_a_triton_module_exports_its_passes(op):
    tree = ast.parse((ROOT / f"triton_kernels/{op}.py").read_text())
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"fwd", "bwd"} <= defined.keys()
    for name, schema in hub(op).SCHEMAS.items():
        wanted = re.findall(r"(\w+)(?=[,)])", schema.split("->")[0])
        assert [argument.arg for argument in defined[name.removeprefix(f"{op}_")].args.args] == wanted, name


@every_op
def test_the_readme_claims_what_is_there(op):
    """One row an op in the table `| op | cpu | cuda | triton | eager |`: a dtype list, or a dash where there is no kernel."""
    text = (ROOT / "README.md").read_text()
    (row,) = re.findall(rf"^\| *`{op}` *\|(.+)\|$", text, re.M)
    (header,) = re.findall(r"^\| *op *\|(.+)\|$", text, re.M)
    claims = {name.strip().lower(): cell.strip() for name, cell in zip(header.split("|"), row.split("|"), strict=True)}
    assert {"cpu", "triton", "eager"} <= {name.split()[0] for name in claims}
    for name, cell in claims.items():
        backend = name.split()[0]
        if backend in BACKENDS and backend != "eager":
            assert (cell.strip("-–— ") not in ("", "no")) == (backend in OPS[op]), f"README says {cell!r} for {backend}"


def tracked_files() -> list[pathlib.Path]:
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.fail(f"needs a git checkout: {listing.stderr}")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_knows_one_machine():
    """No absolute path of somebody's folders and no address of a package index."""
    machine = re.compile(rb"(?<![\w.])/(?:home|Users|root|work\w*|mnt|srv)/\w|index-url|pypi\.\w+\.(?!org)")
    for path in tracked_files():
        if path != pathlib.Path(__file__):
            found = machine.search(path.read_bytes())
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"
    assert machine.search(b"see /home" + b"/someone/notes")


def test_files_fit_in_the_head():
    limits = {"fastconv/ops": 200, "fastconv": 400, "triton_kernels": 400, "csrc": 400}
    for path in tracked_files():
        relative = path.relative_to(ROOT).as_posix()
        limit = next((n for folder, n in limits.items() if relative.startswith(folder + "/")), None)
        if limit and path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            assert len(path.read_text().splitlines()) <= limit, f"{relative} is over {limit} lines"


@every_op
def test_flops_are_counted(op):
    """torch's FlopCounterMode sees the raw ops, and its numbers are those of fastconv._C."""
    case = next(c for c in CASES[op] if not c.without and not c.wide and c.C == 33)
    inputs = make_inputs(case, torch.float32)
    with use_backend("cpu"), FlopCounterMode(display=False) as counter:
        run(getattr(ops, op), inputs)
    by_name = {str(func): n for func, n in counter.get_flop_counts()["Global"].items()}
    assert {name for name in by_name if name.startswith("fastconv.")} == {f"fastconv.{name}" for name in hub(op).SCHEMAS}
    assert all(count > 0 for count in by_name.values())
    if not op.startswith("depthwise_conv"):
        return
    N, H, W, C, K = (*case.shape, case.K)
    pairs = sum(max(0, H - abs(i)) * max(0, W - abs(j)) for i in range(-(K // 2), K // 2 + 1) for j in range(-(K // 2), K // 2 + 1))
    assert by_name[f"fastconv.{op}_fwd"] >= 2 * N * C * pairs  # padding counts, as in torch's own formula for convolutions
    import fastconv._C as native

    assert by_name[f"fastconv.{op}_fwd"] == getattr(native, f"{op}_flops")(N, H, W, C, K)
    assert by_name[f"fastconv.{op}_bwd"] == getattr(native, f"{op}_bwd_flops")(N, H, W, C, K)


@every_op
def test_backward_flops_follow_the_needs(op):
    case = next(c for c in CASES[op] if not c.without and not c.wide and c.C == 33)
    inputs = make_inputs(case, torch.float32)

    def count(*wanted):
        with use_backend("cpu"), FlopCounterMode(display=False) as counter:
            run(getattr(ops, op), inputs, wanted)
        return counter.get_total_flops()

    names = [name for name in inputs.tensors if name not in inputs.constant]
    assert count() < count(names[0], names[1]) <= count(*names)
    if op == "squeeze_excite":
        assert count("w1") == count("w2") < count("x")
    elif op.startswith("depthwise_conv"):
        assert count("x") == count("weight") < count("x", "weight")


def test_recorded_calls_cover_the_ops():
    """The recorder that the tests lean on sees forward and backward of each op."""
    for op in OPS:
        with RawCalls() as recorded, use_backend("cpu"):
            run(getattr(ops, op), make_inputs(CASES[op][1], torch.float32))
        assert {func.__name__.split(".")[0] for func, *_ in recorded.calls} == {f"{op}_fwd", f"{op}_bwd"}
