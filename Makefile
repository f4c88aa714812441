# Needs Python 3.10 or newer with pip and venv; everything else is installed into $(VENV). Only gpu-check
# installs nothing: it runs with the torch and triton that $(PYTHON) has.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PIP_ARGS ?=
OUT ?= benchmarks/results

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PY := $(BIN)/python

# pip runs only when what it reads has changed. The dev set contains the demo set.
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
LOG := $(VENV)/install.log
OLD_TRITON := $(VENV)/triton-3.6.0
LIGHT := $(if $(wildcard $(DEV)),$(DEV),$(DEMO))

# $(call install,extra): one resolver run under the constraints. Shows one line per package that pip has to
# get; the whole output is in the log, and its end is shown when the installation fails.
define install
	@echo "Installing compiled_sparse[$(1)] into $(VENV) (a minute or more the first time)"
	@SECONDS=0; \
	$(PY) -m pip install --progress-bar off $(PIP_ARGS) -c constraints.txt -e '.[$(1)]' 2>&1 \
		| tee $(LOG) | { grep --line-buffered '^Collecting' || [ $$? -eq 1 ]; } | cut -d '(' -f 1 \
		|| { tail -n 12 $(LOG); echo "pip failed; all it said is in $(LOG)"; exit 1; }; \
	echo "Installed in $$SECONDS s"
	@touch $@
endef

.PHONY: help
help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  ARGS='...' is passed on, as in: make test ARGS='-k sta -x'"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"compiled_sparse needs Python 3.10 or newer, got %d.%d. Next: make PYTHON=python3.11 ..." \
		% sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)

$(DEV): pyproject.toml constraints.txt | $(PY)
	$(call install,dev)

$(DEMO): pyproject.toml constraints.txt | $(PY)
	$(call install,demo)

.PHONY: demo
demo: $(LIGHT) ## compile a small video model, compare sparse with dense
	@$(PY) -m compiled_sparse demo $(ARGS)

.PHONY: test
test: $(DEV) ## run the tests, without the slow ones
	@$(PY) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

# The oldest Triton that torch 2.11 brings; the slow tests compile the GPU kernels with it, too.
$(OLD_TRITON): | $(DEV)
	@$(PY) -m pip install --quiet --no-deps --target $@ $(PIP_ARGS) triton==3.6.0

.PHONY: old-triton
old-triton: $(OLD_TRITON) ## get the oldest supported Triton for the slow tests

# The slow tests open pages in a real browser, without a window.
.PHONY: browser
browser: ## get a browser for the slow tests, with apt-get where none is there
	@for name in chromium chromium-browser google-chrome; do \
		if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	as_root=; [ "$$(id -u)" -eq 0 ] || as_root=sudo; \
	$$as_root apt-get update -qq; \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null

.PHONY: test-all
test-all: $(DEV) $(OLD_TRITON) browser ## run every test
	@$(PY) -m pytest $(ARGS)

.PHONY: check
check: $(DEV) ## format, lint, types, docstrings, spelling, repository rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/interrogate compiled_sparse
	$(BIN)/codespell
	$(PY) tools/check_repo.py

.PHONY: format
format: $(DEV) ## rewrite what ruff can fix by itself
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Nothing is fetched: the site is made of this tree and of what is installed.
.PHONY: docs
docs: $(DEV) ## build the documentation as a site into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

.PHONY: bench
bench: $(LIGHT) ## run the benchmarks and record their results
	@$(PY) -m benchmarks $(ARGS)

.PHONY: gpu-check
gpu-check: ## check and measure the GPU kernels; OUT=folder for the record
	@$(PYTHON) -m benchmarks.gpu --output '$(OUT)' $(ARGS)

.PHONY: clean
clean: ## remove caches and build products; keeps the virtual environment
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
