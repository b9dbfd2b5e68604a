# Two commands on a machine with python3 (3.11 or 3.12, with venv), make and git:
#   make quickstart     trains, merges, serves and measures a small model
#   make test           unit tests, then a real model and a real server on the CPU
# Both build .venv from requirements.lock first when needed. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON_RANGE := >=3.11,<3.13
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
BIN := .venv/bin
STAMP := .venv/.setup-done
LATEST := .venv-latest
UNIT_WORKERS ?= 2
INTEGRATION_WORKERS ?= 2
# uv draws progress bars on a terminal; elsewhere its list of 280 packages is noise.
QUIET := $(shell test -t 2 || echo --quiet)
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url

.PHONY: help setup quickstart test test-unit test-integration test-slow test-gpu test-latest lint coverage reference licences images lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(STAMP) ## build .venv from requirements.lock

quickstart: $(STAMP) ## train -> merge -> serve -> bench on the bundled model, no account, no GPU
	$(BIN)/tuneship up recipes/quickstart.toml
	@echo
	@echo "report:  runs/invoice-json/report.html"
	@echo "next:    $(BIN)/tuneship up recipes/quickstart.toml --keep-serving     (nothing is trained again)"

test: test-unit test-integration test-gpu ## all tests that this machine can run

test-unit: $(STAMP)
	@echo "== unit tests"
	$(BIN)/python -m pytest tests/unit -n $(UNIT_WORKERS) -m "not timing and not slow" --hypothesis-profile=ci
	@echo "== unit tests that measure time, one after the other"
	$(BIN)/python -m pytest tests/unit -m timing

test-integration: $(STAMP)
	@echo "== integration tests: a real model and a real SGLang; the tests of a file share a server"
	$(BIN)/python -m pytest tests/integration -n $(INTEGRATION_WORKERS) --dist loadfile --no-loadscope-reorder \
	  -m "not slow" --durations=25

test-slow: $(STAMP) ## what takes minutes for one figure: real adapters on the bundled model, held against PEFT
	$(BIN)/python -m pytest tests/unit tests/integration -m slow -s

test-gpu: $(STAMP)
	@if [ ! -d tests/gpu ]; then echo "== GPU tests: there are none"; \
	elif nvidia-smi -L >/dev/null 2>&1; then echo "== GPU tests"; $(BIN)/python -m pytest tests/gpu; \
	else echo "== GPU tests were NOT run: this machine has no CUDA device"; fi

test-latest: $(LATEST)/.setup-done ## integration tests against the newest SGLang that pyproject.toml allows
	@$(LATEST)/bin/python -c 'from importlib.metadata import version as v; \
	print("==", ", ".join(f"{p} {v(p)}" for p in ("sglang", "torch", "transformers", "peft", "trl", "bitsandbytes")))'
	$(LATEST)/bin/python -m pytest tests/integration -m "not slow"

lint: $(STAMP) ## ruff, mypy, import-linter
	@echo "== ruff check"
	$(BIN)/ruff check
	@echo "== ruff format --check"
	$(BIN)/ruff format --check
	@echo "== mypy"
	$(BIN)/mypy
	@echo "== import-linter"
	$(BIN)/lint-imports

coverage: $(STAMP) ## branches that unit tests take, of what must be right: 90 % of each, or it fails
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -q -n $(UNIT_WORKERS) -m "not timing and not slow" --hypothesis-profile=ci --cov --cov-report= \
	  tests/unit/core tests/unit/cli tests/unit/serve tests/unit/train/test_parity.py \
	  tests/unit/bench/test_calibration.py tests/unit/bench/test_compare*.py
	@for part in "tuneship/core/*" "serve/tuneship/serve/preflight/*" "serve/tuneship/serve/registry/*" \
	  "bench/tuneship/bench/compare/*" "train/tuneship/train/parity.py"; do \
	  printf "%-36s" "$$part"; $(BIN)/coverage report --include="$$part" --fail-under=90 | tail -n 1; done

reference: $(STAMP) ## write the pages of docs/ that are made from the code
	$(BIN)/python docs/makers

licences: $(STAMP) ## write docs/licences.md from what is installed
	$(BIN)/python docs/makers --licences

images: $(STAMP) ## the README's pictures, of real runs: some 20 minutes, and chromium (docs/makers/pictures.py)
	$(UV) run $(QUIET) --no-project --python $(BIN)/python docs/makers/pictures.py

lock: $(UV) ## resolve requirements.lock again (UPGRADE=--upgrade takes newer versions), and the images' locks from it
	$(COMPILE) pyproject.toml --all-extras --group dev $(UPGRADE) -o requirements.lock
	$(COMPILE) pyproject.toml --extra train --extra demo --extra unsloth --group bundled --no-annotate \
	  -c requirements.lock -o docker/train.lock
	$(COMPILE) pyproject.toml --extra serve --no-annotate -c requirements.lock -o docker/serve.lock
	$(COMPILE) --group build --no-annotate -c requirements.lock -o docker/build.lock

clean: ## remove environments and caches; runs/ stays
	rm -rf .venv $(LATEST) .tools .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# uv, where the machine has none, in a folder of its own: the system's pip is not touched.
.tools/bin/uv:
	@echo "uv is not on PATH: putting it into .tools"
	@python3 -m venv .tools || { echo "error: python3 cannot make environments"; echo; \
	  echo "hint: install the venv module (Debian: apt install python3-venv)"; exit 1; } >&2
	@.tools/bin/pip install --quiet --disable-pip-version-check uv

# Compiling all bytecode takes about a minute and saves 16 s of processor time whenever a process loads torch, trl and
# sglang for the first time, or every time where PYTHONDONTWRITEBYTECODE is set; a run starts a dozen such processes.
$(STAMP): requirements.lock pyproject.toml | $(UV)
	@$(call make_venv,.venv)
	@echo "installing requirements.lock into .venv (9 GB on disk; minutes when nothing is cached)"
	$(UV) pip sync $(QUIET) --compile-bytecode --python .venv requirements.lock
	$(UV) pip install --quiet --python .venv --no-deps --editable .
	@touch $@
	@echo "ready: . .venv/bin/activate, then tuneship doctor"

# Run from an empty folder, where uv does not see this project's [tool.uv]: its constraints are the lock's versions,
# which must not bind here. The overrides must, so they are handed over as a file.
$(LATEST)/.setup-done: pyproject.toml | $(UV)
	@$(call make_venv,$(LATEST))
	@$(LATEST)/bin/python -c 'import tomllib; from pathlib import Path; \
	uv = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["uv"]; \
	Path("$(LATEST)/overrides.txt").write_text("\n".join(uv["override-dependencies"]) + "\n")'
	cd $$(mktemp -d) && $(abspath $(UV)) pip install $(QUIET) --upgrade --compile-bytecode --python $(CURDIR)/$(LATEST) \
	  --overrides $(CURDIR)/$(LATEST)/overrides.txt --group $(CURDIR)/pyproject.toml:dev \
	  --editable "$(CURDIR)[train,serve,bench,eval,demo]"
	@touch $@

# Only a Python that is on this machine: nothing is downloaded behind the user's back.
define make_venv
python=$$($(UV) python find --no-python-downloads --system "$(PYTHON_RANGE)" 2>/dev/null) || { \
  echo "error: no Python $(PYTHON_RANGE) on this machine"; echo; \
  echo "hint: install one (Debian: apt install python3.11 python3.11-venv), or let uv do it: $(UV) python install 3.11"; \
  exit 1; } >&2; \
$(UV) venv --quiet --allow-existing --python "$$python" $(1)
endef
