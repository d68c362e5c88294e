# make demo | test | lint | types | wheel | clean. Needs python3 (3.11 or newer) and a C++20 compiler.
# Everything happens in .venv; what is up to date is not made again.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --quiet
LISTED  = $(PY) -c 'import sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
            [t := t[k] for k in sys.argv[1:]]; print(*t)'
NATIVE := $(wildcard native/*.cpp native/*.h native/isa/*.cpp native/isa/*.h tests/*.cpp)

# What the installed package is made of. Folders stand for what is added to them or removed.
PACKAGE := pyproject.toml CMakeLists.txt README.md LICENSE \
           $(shell find native src -name __pycache__ -prune -o ! -name '*.so' -print)

unexport PYTHONPATH    # tests see the installed package, not ./src
.DELETE_ON_ERROR:
.PHONY: help demo test lint types wheel clean

help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(VENV)/.package
	@$(VENV)/bin/chalot demo

test: $(VENV)/.package $(VENV)/.extra-test
	@$(PY) -m pytest -rsfE $(TESTS)

lint: $(VENV)/.extra-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE)

types: $(VENV)/.package $(VENV)/.extra-dev
	@$(PY) -m mypy

wheel: $(VENV)/.made
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	  "$(PYTHON) is Python %d.%d; expected 3.11 or newer: make PYTHON=python3.12" % v[:2])'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# `pip install .` in a build environment that stays: only what changed is compiled again.
$(VENV)/.package: $(PACKAGE) | $(VENV)/.build
	@echo "building and installing chalot"
	@$(PIP) install --no-build-isolation .
	@touch $@

$(VENV)/.build: pyproject.toml | $(VENV)/.made
	@echo "installing what the build needs"
	@$(PIP) install cmake ninja $$($(LISTED) build-system requires)
	@touch $@

# An extra of pyproject.toml without the package itself, which is built once only.
$(VENV)/.extra-%: pyproject.toml | $(VENV)/.made
	@echo "installing what the extra '$*' names"
	@$(PIP) install $$($(LISTED) project optional-dependencies $*)
	@touch $@
