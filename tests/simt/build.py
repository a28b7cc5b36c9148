"""Compiles the CUDA kernels with the host compiler, once a content: objects and libraries are kept in build/simt."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
COMPILER = os.environ.get("CXX", "g++").split()
# -fno-gnu-unique: two builds in one process share nothing.
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-DFASTCONV_SIMT"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-sign-compare"]


class Variant(NamedTuple):
    kernel_flags: tuple[str, ...]
    engine_flags: tuple[str, ...] = ()
    runtime: str = ""  # library to preload
    options: str = ""  # environment variable and value


VARIANTS = {
    "plain": Variant(("-O2", "-march=native")),
    "asan": Variant(
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
        ("-DSIMT_ASAN",),
        "libasan.so",
        "ASAN_OPTIONS=detect_leaks=0:exitcode=66",
    ),
    # Only instrumented modules report; the history is what names both lines of a race.
    "tsan": Variant(
        ("-O1", "-g1", "-fsanitize=thread"),
        ("-DSIMT_TSAN",),
        "libtsan.so",
        "TSAN_OPTIONS=ignore_noninstrumented_modules=1:history_size=4:halt_on_error=1:exitcode=66",
    ),
}


class Bug(NamedTuple):
    """A seeded bug: in csrc/<file>, `code`, found exactly once, becomes `instead`."""

    file: str
    code: str
    instead: str


@functools.cache
def _machine() -> str:
    """What -march=native and the compiler's version depend on."""
    version = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return version + (re.search(r"^flags.*$", cpuinfo.read_text(), re.M) or [""])[0] if cpuinfo.exists() else version


def _read_with_includes(path: pathlib.Path, folders: tuple[pathlib.Path, ...], seen: set[pathlib.Path]) -> bytes:
    """The text of a file and of the files of this project that it includes."""
    seen.add(path)
    text = path.read_text()
    parts = [text.encode()]
    for name in re.findall(r'^\s*#include "([^"]+)"', text, re.M):
        found = next((f for f in ((folder / name).resolve() for folder in (path.parent, *folders)) if f.is_file()), None)
        if found and found not in seen:
            parts.append(_read_with_includes(found, folders, seen))
    return b"\0".join(parts)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")


def _once(suffix: str, key: bytes, make) -> pathlib.Path:
    """build/simt/<hash of key><suffix>, made by make(path) unless it is there; safe between processes."""
    target = CACHE / (hashlib.sha256(key).hexdigest()[:24] + suffix)
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}{suffix}")
        make(partial)
        partial.replace(target)
    return target


def _object(source: pathlib.Path, flags: tuple[str, ...], csrc: pathlib.Path) -> pathlib.Path:
    folders = (csrc, csrc / "cuda", HERE)
    # Where the tree lies is left out of the object: copies of it, with a bug elsewhere, share what they have in common.
    prefix = f"-ffile-prefix-map={csrc.parent}/="
    command = [*COMPILER, *COMMON, *flags, *(f"-I{folder}" for folder in folders), prefix, "-x", "c++", "-c", str(source)]
    key = "\0".join([_machine(), *flags, source.name]).encode() + _read_with_includes(source.resolve(), folders, set())
    return _once(".o", key, lambda target: _run([*command, "-o", str(target)]))


def _link(objects: list[pathlib.Path], flags: tuple[str, ...]) -> pathlib.Path:
    key = "\0".join([_machine(), *flags, *(o.name for o in objects)]).encode()
    return _once(".so", key, lambda target: _run([*COMPILER, "-shared", *map(str, objects), *flags, "-pthread", "-o", str(target)]))


def _compile(jobs: list[tuple]) -> list[pathlib.Path]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: _object(*job), jobs))


def _engine(variant: Variant) -> list[tuple]:
    return [(HERE / name, ("-O2", *WARNINGS, *variant.engine_flags), CSRC) for name in ("engine.cpp", "threads.cpp", "counters.cpp")]


def _sanitizers(variant: Variant) -> tuple[str, ...]:
    return tuple(flag for flag in variant.kernel_flags if flag.startswith("-fsanitize"))


def probes(variant: str = "plain") -> pathlib.Path:
    """The library of tests/simt/probes.cu, for ctypes."""
    v = VARIANTS[variant]
    objects = _compile([(HERE / "probes.cu", (*v.kernel_flags, *WARNINGS), CSRC), *_engine(v)])
    return _link(objects, _sanitizers(v))


def _with_bugs(bugs: tuple[Bug, ...]) -> pathlib.Path:
    """A copy of csrc with the bugs in it."""
    name = hashlib.sha256(repr(bugs).encode()).hexdigest()[:16]
    root = CACHE / "bugs" / f"{name}.{os.getpid()}" / "csrc"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(CSRC, root)
    for bug in bugs:
        text = (root / bug.file).read_text()
        if text.count(bug.code) != 1:
            raise ValueError(f"csrc/{bug.file} holds the code to replace {text.count(bug.code)} times: {bug.code!r}")
        (root / bug.file).write_text(text.replace(bug.code, bug.instead))
    return root


def ops(variant: str = "plain", bugs: tuple[Bug, ...] = ()) -> pathlib.Path:
    """The op library: every kernel and its glue, for torch.ops.load_library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    v = VARIANTS[variant]
    csrc = _with_bugs(bugs) if bugs else CSRC
    torch_flags = ("-O1", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem{path}" for path in include_paths()))
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    glue = sorted(set((csrc / "cuda").glob("*.cpp")))
    try:
        objects = _compile(
            [
                *((path, (*v.kernel_flags, *WARNINGS, *(["-w"] if bugs else [])), csrc) for path in kernels),
                *_engine(v),
                *((path, torch_flags, csrc) for path in glue),
            ]
        )
    finally:
        if bugs:
            shutil.rmtree(csrc.parent)
    libraries = tuple(flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}"))
    return _link(objects, (*_sanitizers(v), *libraries, "-ltorch_cpu", "-lc10"))


def environment(variant: str) -> dict[str, str]:
    """What a process needs to load a library of this variant."""
    v = VARIANTS[variant]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCONV_")}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    if v.runtime:
        # The C++ runtime before torch's, or the sanitizer finds no __cxa_throw to wrap.
        names = (v.runtime, "libstdc++.so.6")
        paths = [
            subprocess.run([*COMPILER, f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip() for n in names
        ]
        name, value = v.options.split("=", 1)
        clean |= {"LD_PRELOAD": " ".join(paths), name: value}
    return clean
