# `make demo` and `make test` are all a fresh machine needs; each sets up what it uses. VENV=dir moves the environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/tools
LOCK := requirements/lock.txt requirements/torch.txt requirements/cuda.txt
# Wheels only, so that nobody's setup.py runs; of tensorrt-rtx-cu13 there is none.
PIP_LOCKED := -m pip install --quiet --no-deps --require-hashes --only-binary :all: --no-binary tensorrt-rtx-cu13

.PHONY: setup demo test cpp-test lint bench reliability lock audit versions clean

setup: $(STAMP)

# What is installed is what the lock names, by hash. torch is the CPU build where pip finds it, else PyPI's with CUDA.
$(STAMP): pyproject.toml $(LOCK) requirements/torch-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_LOCKED) -r requirements/lock.txt
	$(BIN)/python $(PIP_LOCKED) -r requirements/torch-cpu.txt 2>/dev/null || \
		{ echo "pip finds no CPU build of torch with the locked hash: PyPI's instead, with CUDA, about 3 GB" >&2; \
		$(BIN)/python $(PIP_LOCKED) -r requirements/torch.txt -r requirements/cuda.txt; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

demo: setup
	BIN=$(abspath $(BIN)) sh demo.sh

test: setup
	$(BIN)/pytest

# Needs Debian's cmake g++ nlohmann-json3-dev libssl-dev libgtest-dev pkg-config, and for the example service
# libcpp-httplib-dev libjpeg-dev. TENSORRT=DIR compiles that backend too.
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

# What docs/reliability.md promises, shown; it takes hours. fuzz needs CPython 3.11 to 3.13.
reliability: setup
	$(BIN)/python reliability/crash.py
	$(BIN)/python reliability/concurrency.py
	$(BIN)/python reliability/inputs.py
	$(BIN)/python reliability/fuzz.py
	$(BIN)/python reliability/load.py
	$(BIN)/python reliability/versions.py

# Needs no environment but its own. UV="--upgrade-package NAME" or UV=--upgrade moves versions.
lock: $(TOOLS)/.installed
	$(TOOLS)/bin/python requirements/lock.py $(UV)

# Asks PyPI's service for known vulnerabilities; --strict, because pip-audit calls it a success when that does not answer.
audit: $(TOOLS)/.installed
	set -e; for list in $(LOCK) requirements/tools.txt; do \
		$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r $$list \
			$$(sed -n 's/^\([A-Z][A-Za-z0-9-]*\) .*/--ignore-vuln \1/p' requirements/audit-ignore.txt); done

$(TOOLS)/.installed: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP_LOCKED) -r requirements/tools.txt
	touch $@

# Lowest, locked and highest versions, on every Python from 3.10 to 3.13 that is on PATH.
versions: setup
	$(BIN)/python reliability/versions.py

clean:
	rm -rf $(VENV) cpp/build demo build dist *.egg-info
