# Everything a checkout can do. `make serve` and `make test` work from a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ROOMS := server engine kernels cache loadtest

# A folder, a .gguf file, or nothing for the default model; further flags of `convserve serve`.
MODEL ?=
ARGS ?=
# Another index to take torch from, such as PyTorch's index of CPU builds.
TORCH_INDEX ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest

.PHONY: help env serve test test-gpu lint format bench bench-kernels clean

help:
	@echo "make serve [MODEL=folder|file.gguf] [ARGS='--port 8001']   serve a model over HTTP"
	@echo "make test | test-gpu                                       run tests"
	@echo "make lint | format                                         check or fix style, check types"
	@echo "make bench | bench-kernels                                 measure"
	@echo "make env | clean                                           make or remove $(VENV)"

env: $(INSTALLED)

# The rooms are mapped into the package `convserve` when it is installed; type checkers follow
# folders, so they get the same mapping as links.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else 'convserve needs Python >= 3.11, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ...' % v)"
	@echo "installing into $(VENV) (the first time takes a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) setuptools torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	mkdir -p $(VENV)/import-root/convserve
	for room in $(ROOMS); do ln -sfn ../../../$$room $(VENV)/import-root/convserve/$$room; done
	touch $@

serve: env
	$(BIN)/convserve serve $(MODEL) $(ARGS)

test: env
	$(PYTEST)

# The same kernel tests, on the device instead of Triton's interpreter, and those of captured graphs.
test-gpu: env
	$(PYTEST) tests/kernels

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python bench/cpu.py

bench-kernels: env
	$(BIN)/python bench/kernels.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
