# Everything a checkout can do. `make serve` and `make test` work from a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := $(VENV)/clients
ROOMS := server engine kernels cache loadtest

# A folder, a .gguf file, or nothing for the default model; further flags of `convserve serve`.
MODEL ?=
ARGS ?=
# Another index to take torch from, such as PyTorch's index of CPU builds.
TORCH_INDEX ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest

.PHONY: help env serve test test-gpu sanitize-gpu soak-gpu test-clients lint format bench bench-gpu bench-kernels clean

help:
	@echo "make serve [MODEL=folder|file.gguf] [ARGS='--port 8001']   serve a model over HTTP"
	@echo "make test | test-gpu | sanitize-gpu | soak-gpu             run tests"
	@echo "make test-clients                                          run LiteLLM, lm-eval, GuideLLM and AIPerf on it"
	@echo "make lint | format                                         check or fix style, check types"
	@echo "make bench | bench-gpu | bench-kernels                     measure"
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

# Two processes, a thread each: most of the time is Python's.
test: env
	OMP_NUM_THREADS=1 $(PYTEST) --numprocesses 2 --dist loadfile

# The same kernel tests, on the device instead of Triton's interpreter, those of captured graphs, and
# the engine's.
test-gpu: env
	$(PYTEST) tests/kernels tests/engine/test_gpu.py

# Without torch's pool of memory a byte past a tensor's end belongs to nobody; graphs need the pool.
sanitize-gpu: env
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTEST) tests/kernels -k "triton and not captured" --timeout 0

# Ten minutes of random traffic for each of some models.
soak-gpu: env
	$(PYTEST) tests/engine/test_gpu_soak.py -m soak --log-cli-level WARNING

# Other people's clients, in an environment of their own, against a server with the default model.
$(CLIENTS)/.installed: tests/clients/requirements.txt $(INSTALLED)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(shell grep ^torch== constraints.txt)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet \
		--requirement tests/clients/requirements.txt
	touch $@

test-clients: $(CLIENTS)/.installed
	$(PYTEST) tests/clients -m clients

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: env
	$(BIN)/python bench/cpu.py
	$(BIN)/python bench/prefix.py

bench-gpu: env
	$(BIN)/python bench/gpu_engine.py

bench-kernels: env
	$(BIN)/python bench/kernels.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
