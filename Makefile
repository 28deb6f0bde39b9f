# Everything runs inside .venv, which `make install` creates when it is missing or out of date.
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install quickstart test chaos lint types check clean

help:  ## Print this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## Create .venv and install everything for a machine without a GPU
	@bash tools/install.sh

quickstart: install  ## Train the built-in model with HAPO: a few minutes on two cores
	$(PY) -m hapo_async train configs/quickstart.yaml run.resume=never

test: install  ## Run all tests
	$(PY) -m pytest tests

chaos: install  ## Break real runs in every way, about an hour and a half; goes on where it was
	$(PY) tools/chaos.py && $(PY) tools/chaos.py --table

lint: install  ## Style, import direction, security
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) tools/check_imports.py && $(PY) tools/security_lint.py

types: install  ## Type check
	$(PY) -m mypy

check: lint types test  ## All of the above

clean:  ## Remove caches (runs/ and .venv stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build *.egg-info
