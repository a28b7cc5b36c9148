import pytest
import torch

from fastconv.ops import _grouped, _registry


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow") or "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def threads():
    """torch.set_num_threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """Small tensors run our kernels too, and the reports of patched models are the same on every processor.

    test_registry.py and test_patch_linear.py are about where torch's own kernels are chosen because they are faster.
    """
    monkeypatch.setattr("fastconv.ops._linear.PREFERS_CONVOLUTION", False)
    monkeypatch.setattr(_grouped, "passes", lambda *args: _grouped.ALL)
    monkeypatch.setattr(_grouped, "native_everywhere", lambda *args: "")
    for op in _registry.MIN_CPU_ELEMENTS:
        monkeypatch.setitem(_registry.MIN_CPU_ELEMENTS, op, 0)
