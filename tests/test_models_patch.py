"""The table of bundled models: it says what `fastconv.patch` fuses, which changes nothing of the user's, and what the docstrings say."""

import importlib
import re
import warnings

import pytest
from convnet_helpers import published
from model_helpers import build_meta, shapes, smallest_of_each_family

import fastconv
from fastconv.models import MODELS

QUICK = smallest_of_each_family()  # the quick suite's share of a test that takes seconds on the largest
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_patch(name):
    model = build_meta(name)
    before = shapes(model.state_dict())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastconv.patch(model)
    assert {site.op for site in report.fused} == set(MODELS[name].ops)
    assert {site.status for site in report.sites} <= {"fused", "native", "declined"}
    assert all(site.reason for site in report.declined + report.native)
    fused, blocks = report.blocks
    assert {site.op for site in report.declined} <= {"grouped_conv"}
    assert fused == blocks - len(report.declined) and (fused > 0) == bool(report.fused)
    assert shapes(model.state_dict()) == before
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert {name: type(module).__name__ for name, module in model.named_modules()} == {n: kind.__name__ for n, kind in kinds.items()}
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == {site.name for site in report.fused}
    fastconv.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def numbers(line):
    """Those of a line of text; counts in full also in millions and billions."""
    found = {float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", line)}
    return found | {published(number / unit) for number in found if number > 1e4 for unit in (1e6, 1e9)}


@pytest.mark.parametrize("module", sorted({spec.module for spec in MODELS.values()}))
def test_docstrings_hold_the_table(module):
    """Paper, year, and a line with the parameters and GMACs of each model, as `fastconv models` lists them."""
    text = importlib.import_module(f"fastconv.models.{module}").__doc__
    assert re.search(r"\b(19|20)\d\d\b", text) and ("arXiv" in text or "Proceedings" in text)
    for spec in MODELS.values():
        if spec.module == module:
            assert any({spec.params, spec.gmacs} <= numbers(line) for line in text.splitlines()), spec.name


def test_the_quick_models_are_of_every_file():
    assert {MODELS[name].module for name in QUICK} == {spec.module for spec in MODELS.values()}
