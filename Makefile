# Everything a fresh machine needs: `make demo`, `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Tests wait for other processes a third of the time: three at a time keep two cores busy.
WORKERS ?= 3

.PHONY: demo test test-all check gpu bench allocator s3-server clean

.venv/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.run allocator
	$(BIN)/dagflow demo

# Modules in the order that tests/conftest.py gives them.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q

test: .venv/.dev allocator s3-server
	$(PYTEST) -m "not slow"

# With the tests marked `slow`: more seeds of faults, the whole zoo of models, longer variations.
test-all: .venv/.dev allocator s3-server
	$(PYTEST)

# jemalloc: with it workers take less memory than with the allocator that dagflow brings. Never fails.
allocator:
	@PATH="$$PATH:/sbin:/usr/sbin"; ldconfig -p 2>/dev/null | grep -q libjemalloc || test "$$(id -u)" != 0 || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends libjemalloc2; } \
		</dev/null >/dev/null 2>&1 || true

# The S3 server that the tests start. Never fails: without it those tests say that they are skipped.
s3-server:
	@sh tests/install_radosgw.sh

# The tests that need a CUDA device.
gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu -q

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q --doctest-modules dagflow tasks storage

bench: .venv/.dev allocator
	$(BIN)/python benchmarks/train_throughput.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
