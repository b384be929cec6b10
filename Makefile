# `make demo` and `make test` are all a fresh machine needs; each sets up what it uses. VENV=dir moves the environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test cpp-test lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[cpu,openvino,build,rtx,dev]' -c constraints.txt
	touch $@

demo: setup
	BIN=$(abspath $(BIN)) sh demo.sh

test: setup
	$(BIN)/pytest

# Needs Debian's cmake g++ nlohmann-json3-dev libssl-dev libgtest-dev pkg-config. TENSORRT=DIR compiles that backend too.
cpp-test: setup
	sh cpp/test.sh $(abspath $(BIN))/python

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/build.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/limits.py
	$(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/serving.py

clean:
	rm -rf $(VENV) cpp/build demo build dist *.egg-info
