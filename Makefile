# The commands of this project; .ci/run runs the same ones. `make help` lists them.
#
#   make test PYTHON=python3.12       another Python, 3.11 or later
#   make test VENV=.venv-3.12         another environment, beside the first
#   make quickstart TORCH_INDEX=URL   an index of torch builds for CPUs, as pytorch.org names one:
#                                     a tenth of the download on Linux

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
GPU_PYTHON ?=

BIN := $(VENV)/bin
# Named for the Python it was made with, so that another PYTHON makes the environment anew.
STAMP := $(VENV)/.installed-with-$(notdir $(PYTHON))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv quickstart quickstart-vision test test-slow test-eval test-gpu lint types docs check format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: $(STAMP)  ## the environment, in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "transmamba needs Python 3.11 or later, and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	@test -e $@ || { echo "Creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing torch (a large download, once)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "Installing transmamba and what it needs"
	@$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## train a small Transformer, convert it, distil it, write runs/quickstart/report.html
	@$(BIN)/transmamba quickstart

quickstart-vision: $(STAMP)  ## train a small ViT on handwritten digits and make a Mamba out of it, runs/quickstart-vision/report.html
	@$(BIN)/transmamba quickstart --vision

test: $(STAMP)  ## every test that is quick, on two cores
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(STAMP)  ## the tests that take minutes each
	@$(BIN)/python -m pytest -m slow

test-eval: $(STAMP)  ## the tests that need lm-eval, which is installed for them
	@$(PIP) --editable '.[dev,eval]'
	@$(BIN)/python -m pytest tests/tasks tests/cli/test_evaluate.py

test-gpu: $(if $(GPU_PYTHON),,$(STAMP))  ## the tests that need a CUDA device; GPU_PYTHON=... uses a Python you have
	@PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu

lint: $(STAMP)  ## formatting and lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(STAMP)  ## static types
	@$(BIN)/mypy

docs: $(STAMP)  ## links, commands and code of README and docs
	@$(BIN)/python -m pytest tests/test_docs.py

check: lint types test  ## what must be green before a change goes in

format: $(STAMP)  ## rewrite the files in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)  ## every benchmark, one after the other
	@set -e; for bench in $$(find benchmarks -name 'bench_*.py' | sort); do echo "== $$bench"; $(BIN)/python $$bench; done

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
