# A fresh clone needs Python, a C++ compiler and make: `make demo` and `make test` do all the set-up, once, in .venv.
PYTHON ?= python3
TORCH ?= torch
OUT ?= out
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# One stamp for the packages, named after the torch asked for, and one for the compiled libraries.
DEPS := $(VENV)/.deps-$(subst =,-,$(subst >,,$(TORCH)))
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f 2>/dev/null)
BUILD = PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) setup.py --quiet build_ext --inplace

.PHONY: help setup demo test test-full bench gpu-check lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'PYTHON=python3.12   the Python that .venv is made from     TORCH=torch==2.13.0   another torch'
	@echo 'OUT=folder          where bench and gpu-check write        ARGS="..."            passed on to demo and bench'
	@echo 'STAGE=probe,bench   stages of gpu-check, default all: probe, test, sanitize, graph, bench'

# torch first, so that our build and torchvision see the one that was asked for. The package is registered without its
# compiled parts here; BUILT makes them, and remakes only what changed.
$(DEPS): pyproject.toml
	@start=$$(date +%s) && echo "installing packages into $(VENV)" \
	&& { test -x $(PY) || $(PYTHON) -m venv $(VENV); } \
	&& $(PY) -m pip install --quiet "$(TORCH)" "setuptools>=77" pybind11 ninja \
	&& FASTCONV_CPU=0 $(PY) -m pip install --quiet --no-build-isolation -e ".[test]" "$(TORCH)" \
	&& rm -f $(VENV)/.deps-* $(BUILT) && touch $@ && echo "installed in $$(($$(date +%s) - start)) s"

$(BUILT): $(DEPS) setup.py $(SOURCES)
	@start=$$(date +%s) && echo "building the compiled libraries" \
	&& $(BUILD) \
	&& touch $@ && echo "built in $$(($$(date +%s) - start)) s"

setup: $(BUILT)  ## make .venv and build the compiled libraries in place

demo: $(BUILT)  ## train a ConvNeXt twice, as it came and patched: same losses, less time
	$(VENV)/bin/fastconv demo $(ARGS)

# Warnings of the CUDA library are errors here; the second build remakes what was built without that.
test test-full: export FASTCONV_WERROR = 1

test: $(BUILT)  ## every check of CI, in stages with a time budget each
	@$(BUILD)
	$(PY) tests/run_stages.py

test-full: $(BUILT)  ## the same stages with all their slow tests, no budgets
	@$(BUILD)
	$(PY) tests/run_stages.py --full

bench: $(BUILT)  ## op and model benchmarks, JSON into OUT
	$(PY) -m pytest benchmarks --out="$(OUT)" $(ARGS)

gpu-check:  ## on a machine with a GPU: build with PYTHON as it is, no network, check and measure; results into OUT
	$(PYTHON) benchmarks/gpu_check.py --out "$(OUT)" $(if $(STAGE),--stage "$(STAGE)")

lint: $(BUILT)  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(BUILT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove what was built, .venv stays
	rm -rf build dist *.egg-info out .pytest_cache .ruff_cache .benchmarks
	rm -f fastconv/*.so fastconv/*.pyd $(BUILT)
