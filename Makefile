# Each target does all of its own set-up: Python >= 3.11 and make are enough. A second run skips the installation.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-all lint clean distclean

help:
	@echo "make demo       diagnose the embedded model"
	@echo "make test       ruff, mypy, pytest without what is slow by nature"
	@echo "make test-all   ruff, mypy, pytest"
	@echo "make lint       ruff, mypy"
	@echo "make clean      remove caches and build output"
	@echo "make distclean  remove the virtual environment too"

demo: $(RUNTIME)
	$(VENV)/bin/aqnfx demo

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "aqnfx: '$(PYTHON)' not found; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "aqnfx needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# PyTorch first and by itself, so that nothing that depends on it can choose another build; then what the build needs.
$(RUNTIME): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing (PyTorch is large: some minutes on a slow line) ..."
	@$(PIP) torch==2.13.0
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e .
	@touch $@

# What the tests need beside it: other packages' formats, exports, trainers and harnesses to compare with.
$(DEV): $(RUNTIME)
	@echo "Installing what the tests compare with ..."
	@$(PIP) --no-build-isolation -e '.[dev,ray,large]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage aqnfx-out
	find aqnfx passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
