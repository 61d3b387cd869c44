# make setup | demo | test | test-slow | test-nightly | lint. Each works on a fresh clone: what it needs is made first.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# Another release than the lock's: make test VLLM=0.31.0, or VLLM=newest; it gets an environment of its own.
VLLM ?=
# torch.compile cannot use an environment whose path has a space: it goes elsewhere, and a link to it here.
ifneq ($(words $(CURDIR)),1)
ELSEWHERE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vllm-mod/$(shell pwd | cksum | cut -d ' ' -f 1)/
endif
VENV := $(ELSEWHERE).venv$(if $(VLLM),-$(shell echo $(VLLM) | cut -d. -f1,2))
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ifneq ($(VLLM),)
export VLLM_MOD_ALLOW_UNTESTED := 1
endif

# Replace the demo's model (local directory or hub name) and data: make demo MODEL=... DATA=...
MODEL ?=
DATA ?=
# More options for pytest: make test ARGS='-k gate'
ARGS ?=

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## make .venv with the CPU environment of requirements/cpu.txt
	$(if $(PYTHON),,$(error Python 3.11 to 3.13 is needed; name one with make PYTHON=...))
	@$(PYTHON) requirements/install.py --venv $(VENV) $(if $(VLLM),--vllm $(VLLM))
	$(if $(ELSEWHERE),@ln -sfn $(VENV) $(notdir $(VENV)))

.PHONY: demo
demo: setup ## tune routers for a real model, serve it dense and routed, ask both, show what was skipped
	$(BIN)/python demo/run.py $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)')

.PHONY: test
test: setup ## run the test suite (all but the tests marked slow), two modules at a time
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow and not nightly' $(ARGS)

.PHONY: test-slow
test-slow: setup ## soak, two-process and large parity tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'slow and not nightly' $(ARGS)

.PHONY: test-nightly
test-nightly: setup ## what takes too long before each merge
	$(BIN)/python -m pytest -n 2 --dist worksteal -m nightly $(ARGS)

.PHONY: lint
lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
