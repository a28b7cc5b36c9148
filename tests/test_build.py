"""Packaging: what a source distribution and a wheel hold, and how the build behaves where something is missing."""

import email
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DEVELOPMENT = (".git", ".venv", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__", ".pytest_cache", ".ruff_cache", ".benchmarks")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


def run(*command, cwd, **environment):
    """A process that finds the tools of this environment and no switch of ours but those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTCONV_") and k != "PYTHONPATH"}
    inherited["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=550)


def python(code, cwd, **environment):
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def checkout(path: pathlib.Path) -> pathlib.Path:
    """A copy of the sources in which nothing is built."""
    return shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(*DEVELOPMENT))


def build(kind: str, source: pathlib.Path, target: pathlib.Path, **environment):
    """Call the build backend's hook, as pip does without build isolation."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    return python(code, source, **environment)


def only(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    (found,) = folder.glob(pattern)
    return found


def install(wheel: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    result = run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel, cwd=target.parent)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    result = build("sdist", checkout(folder / "source"), folder / "dist", FASTCONV_CPU="0")
    assert result.returncode == 0, result.stderr
    return only(folder / "dist", "*.tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built by pip from the source distribution, so that a file missing there is missed. The CPU's compiled parts alone: minutes less."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    result = run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder, FASTCONV_CPU="1", FASTCONV_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    return only(folder, "*.whl")


@pytest.fixture(scope="module")
def plain_wheel(sdist, tmp_path_factory):
    """The wheel of a machine without a compiler."""
    folder = tmp_path_factory.mktemp("plain")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    result = build("wheel", only(folder, "fastconv-*"), folder / "dist", FASTCONV_CPU="0")
    assert result.returncode == 0, result.stderr
    return only(folder / "dist", "*.whl")


def members(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def package_files() -> set[str]:
    """The Python files of the package, by the names that they have once installed."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastconv").rglob("*.py")}
    return files | {f"fastconv/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}


def test_sdist_holds_all_that_a_build_and_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p.relative_to(ROOT).as_posix() for d in ("csrc", "tests", "benchmarks") for p in (ROOT / d).rglob("*.[chp]*") if p.is_file()}
    wanted = {name for name in wanted if not name.endswith(".pyc") and "/results/" not in name}
    assert {"csrc/geometry.h", "csrc/cpu/ops.cpp", "tests/conftest.py", "benchmarks/op_race.py"} <= wanted
    wanted |= {
        "benchmarks/pytest.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "triton_kernels/depthwise_conv.py",
    }
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@needs_compiler
def test_wheel_holds_the_package_and_its_libraries(wheel):
    names = members(wheel)
    assert not package_files() - names
    assert "fastconv/_ops_cpu.so" in names and "fastconv/_ops_cuda.so" not in names
    assert any(name.startswith("fastconv/_C.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert top == {"fastconv", only_dist_info(names)}, top


def only_dist_info(names: set[str]) -> str:
    (found,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return found


def test_the_base_needs_torch_alone(plain_wheel):
    with zipfile.ZipFile(plain_wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{only_dist_info(members(plain_wheel))}/METADATA"))
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert base == ["torch>=2.11"]
    assert {"cli", "demo", "bench", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload().startswith("# fastconv")


RUN_OP = """
import torch, fastconv
from fastconv import ops
print(fastconv.__file__)
x = torch.arange(2 * 5 * 4 * 3.0).reshape(2, 5, 4, 3)
weight = torch.zeros(3, 1, 3, 3)
weight[:, 0, 1, 2] = 1  # moves every row one pixel to the left
y = ops.depthwise_conv(x, weight)
assert torch.equal(y[:, :, :-1], x[:, :, 1:]) and not y[:, :, -1].any()
print(ops.select("depthwise_conv", x, weight))
"""


@needs_compiler
def test_installed_wheel_runs_the_cpu_kernels(wheel, tmp_path):
    site = install(wheel, tmp_path / "site")
    code = RUN_OP + "import fastconv._C, fastconv.triton_kernels as t; print(t.__file__, fastconv._C.__file__)"
    result = python(code, tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    paths = [word for word in result.stdout.split() if word.startswith("/")]
    assert len(paths) == 3 and all(path.startswith(str(site)) for path in paths), result.stdout
    assert "backend='cpu', reason=''" in result.stdout


@needs_compiler
def test_the_doctor_of_a_build_without_cuda_says_why(wheel, tmp_path):
    site = install(wheel, tmp_path / "site")
    result = python("from fastconv import doctor; print(doctor.__file__); doctor.main()", tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0 and result.stdout.startswith(str(site)), result.stderr
    assert re.search(r"^CUDA kernels +the CUDA library is not built: FASTCONV_CUDA=0 ", result.stdout, re.M), result.stdout


def test_without_compiled_parts_it_runs_eager_and_says_why(plain_wheel, tmp_path):
    names = members(plain_wheel)
    assert plain_wheel.name.endswith("py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")] and not package_files() - names
    site = install(plain_wheel, tmp_path / "site")
    result = python(RUN_OP, tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert "backend='eager'" in result.stdout and "not built (install a C++ compiler, then reinstall fastconv)" in result.stdout


def test_an_unbuilt_checkout_names_the_remedy(tmp_path):
    source = checkout(tmp_path / "source")
    code = "import torch, fastconv\nprint(fastconv.__file__)\nwith fastconv.use_backend('cpu'):\n"
    code += "    fastconv.ops.depthwise_conv(torch.zeros(1, 3, 3, 2), torch.zeros(2, 1, 3, 3))"
    result = python(code, source)
    assert result.stdout.startswith(str(source))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: depthwise_conv: backend 'cpu' was asked for and cannot run") and "install a C++ compiler" in last


@pytest.mark.parametrize("where", ("CXX", "PATH"))
def test_a_machine_without_a_compiler(sdist, tmp_path, where):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = only(tmp_path, "fastconv-*")
    missing = {"CXX": "no-such-compiler"} if where == "CXX" else {"CXX": "c++", "PATH": str(tmp_path)}
    result = build("wheel", source, tmp_path / "dist", **missing)
    assert result.returncode == 0, result.stderr
    assert "installing without compiled kernels: no C++ compiler" in result.stderr
    assert only(tmp_path / "dist", "*.whl").name.endswith("py3-none-any.whl")
    result = build("wheel", source, tmp_path / "dist", FASTCONV_CPU="1", **missing)
    assert result.returncode != 0
    assert "FASTCONV_CPU=1, but no C++ compiler" in result.stderr


@needs_compiler
def test_a_build_without_its_tools_names_them(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "pybind11.py").write_text("raise ImportError('no pybind11')")
    result = build("wheel", only(tmp_path, "fastconv-*"), tmp_path / "dist", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "needs torch, pybind11 and ninja (no pybind11)" in last and "pip install torch pybind11 ninja" in last


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
def test_with_build_isolation(sdist, tmp_path):
    """pip fetches torch and the other build requirements by itself: gigabytes."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTCONV_")}
    result = subprocess.run(command, cwd=tmp_path, env={**environment, "FASTCONV_CPU": "1"}, capture_output=True, text=True, timeout=1700)
    assert result.returncode == 0, result.stdout + result.stderr
    site = install(only(tmp_path, "*.whl"), tmp_path / "site")
    result = python(RUN_OP, tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0 and "backend='cpu', reason=''" in result.stdout, result.stdout + result.stderr


def stages():
    spec = importlib.util.spec_from_file_location("run_stages", ROOT / "tests/run_stages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_stages"] = module
    spec.loader.exec_module(module)
    return module


def test_every_test_file_is_in_one_stage():
    files = [name for names in stages().files_of().values() for name in names]
    assert sorted(files) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


@pytest.mark.parametrize(
    "code, minutes, full, failed, outcome",
    (
        ("pass", 1, False, 0, "passed"),
        ("raise SystemExit(3)", 1, False, 1, "failed"),
        ("import time; time.sleep(0.3)", 0.001, False, 1, "passed, over its budget by more than half"),
        ("import time; time.sleep(0.3)", 0.001, True, 0, "passed"),
        ("import os; assert 'TRITON_INTERPRET' not in os.environ and 'FASTCONV_BACKEND' not in os.environ", 1, False, 0, "passed"),
    ),
)
def test_stages_fail_on_failure_and_on_time(monkeypatch, capfd, code, minutes, full, failed, outcome):
    module = stages()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTCONV_BACKEND", "eager")
    monkeypatch.setattr(module, "STAGES", (module.Stage("ops", minutes),))
    monkeypatch.setattr(module, "commands", lambda *args: [[sys.executable, "-c", code]])
    assert module.main(["ops", *["--full"] * full]) == failed
    assert capfd.readouterr().out.strip().endswith(outcome)


MEET = """
import pathlib, time
mine, other = pathlib.Path({mine!r}), pathlib.Path({other!r})
mine.touch()
start = time.monotonic()
while not other.exists():
    assert time.monotonic() - start < {patience}, "alone"
    time.sleep(0.01)
print("met")
"""


@pytest.mark.parametrize("full, failed", [(False, 0), (True, 1)])
def test_two_stages_run_side_by_side(tmp_path, monkeypatch, capfd, full, failed):
    """All but the one that needs the machine's memory for its slow tests. What each prints stays in one piece."""
    module = stages()
    names = (module.LARGEST, "models")
    monkeypatch.setattr(module, "STAGES", tuple(module.Stage(name, 1) for name in names))

    def meet(name, *args):
        mine, other = (str(tmp_path / n) for n in sorted(names, key=lambda n: n != name))
        code = MEET.format(mine=mine, other=other, patience=0.5 if full and name == module.LARGEST else 60)
        return [[sys.executable, "-c", code]]

    monkeypatch.setattr(module, "commands", meet)
    assert module.main([*names, *["--full"] * full]) == failed
    printed = capfd.readouterr().out
    assert ("AssertionError: alone" in printed) == full
    assert printed.count("\nmet\n\n=== ") == 2 - full


def test_a_stage_without_tests_is_not_green(monkeypatch, capfd):
    module = stages()
    monkeypatch.setattr(module, "commands", lambda *args: [])
    assert module.main(["models"]) == 1
    assert "no tests" in capfd.readouterr().out


def test_the_example_of_the_readme_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    result = python(code + "assert model.stem[0].weight.grad.any()", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "18 of 18" in result.stdout, result.stdout


def test_make_lists_its_commands():
    result = run("make", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for name in ("demo", "test", "test-full", "bench", "gpu-check", "lint", "clean"):
        assert f"\n{name} " in "\n" + result.stdout, name
    ci = ROOT / ".ci/run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text()
