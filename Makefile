# make env | pretrain | test | test-cluster | lint | format | clean      (needs CPython >= 3.11 and a C compiler)
#
# PYTHON=python3.12      the interpreter that .venv is made with
# TORCH_INDEX=URL        take torch from this wheel index (a CPU-only one, or another CUDA version)
# CONFIG=FILE            what `make pretrain` runs
# WORKERS=4             test processes side by side; each uses one core
# PYTEST_ARGS='-k muon'  more arguments for pytest
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/quickstart.yaml
WORKERS ?= 2
PYTEST_ARGS ?=
VENV := $(ROOT)/.venv
RUN := cd $(ROOT) && PATH="$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(VENV)"
TORCH := torch==$(shell sed -n 's/^torch==//p' $(ROOT)/constraints.txt)
# The name of the stamp holds a checksum of what was installed: an edit to either file installs again.
STAMP := $(VENV)/.installed-$(shell cat $(ROOT)/pyproject.toml $(ROOT)/constraints.txt | cksum | tr ' ' '-')

.PHONY: help env pretrain test test-cluster lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' $(ROOT)/Makefile | head -n 7

env: $(STAMP)

# torch comes first and exactly: resolved together with the rest, pip may fetch gigabytes of CUDA packages for another version.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 on PATH; say which with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; choose with PYTHON=..." >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(VENV)/bin/python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
	$(VENV)/bin/python -m pip install --quiet --editable "$(ROOT)[dev]" --constraint $(ROOT)/constraints.txt
	@rm -f $(VENV)/.installed-*
	@touch $@

pretrain: env
	$(RUN) mesokurt pretrain $(CONFIG)

test: env
	@if [ "$${CI:-}" = true ]; then $(ROOT)/launch/cluster/install.sh || echo "make test: the cluster tests will be skipped"; fi
	$(RUN) python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-cluster: env
	$(ROOT)/launch/cluster/install.sh
	$(RUN) python -m pytest -m cluster $(PYTEST_ARGS)

lint: env
	$(RUN) ruff check && ruff format --check && mypy && lint-imports

format: env
	$(RUN) ruff check --fix && ruff format

clean:
	rm -rf $(VENV) $(ROOT)/build $(ROOT)/dist $(ROOT)/*.egg-info $(ROOT)/.mypy_cache $(ROOT)/.ruff_cache $(ROOT)/.pytest_cache \
	  $(ROOT)/.hypothesis $(ROOT)/.import_linter_cache
	find $(ROOT) -name __pycache__ -type d -prune -exec rm -rf {} +
