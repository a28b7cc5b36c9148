"""`fastconv.patch` on every bundled model: what it fuses is what the table says, and nothing of the user's changes."""

import warnings

import pytest
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


def test_the_quick_models_are_of_every_file():
    assert {MODELS[name].module for name in QUICK} == {spec.module for spec in MODELS.values()}
