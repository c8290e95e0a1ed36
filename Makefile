# `make serve` and `make test` do all set-up themselves, in .venv, and do it again only when pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
# Only errors: pip's warnings about a user's own indexes and caches are no news about Pronk.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CPU_INDEX := https://download.pytorch.org/whl/cpu

# The first Python of 3.11 or newer. Another: make serve PYTHON=/path/to/python
PYTHON = $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
MODEL ?=
ARGS ?=

.PHONY: help serve test check clean
.DEFAULT_GOAL := help

help:  ## Say what can be made
	@sed -n 's/^\([a-z]*\):.*##\(.*\)/  make \1\t\2/p' Makefile
	@echo '  Also: make serve MODEL=meta-llama/Llama-3.2-1B-Instruct ARGS="--port 9000", make test ARGS="tests/engine -x"'

serve: $(VENV)/.installed  ## Start the server: MODEL is a folder or a Hub id (none: the embedded model), ARGS are flags
	@exec $(BIN)/pronk serve $(if $(MODEL),"$(MODEL)") $(ARGS)

# One thread each: the tests' tensors are small, and on a busy machine threads that wait for one another take minutes.
test: $(VENV)/.installed-test  ## Run the tests: ARGS go to pytest
	@exec env OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest $(ARGS)

check: $(VENV)/.installed-dev  ## Lint, formatting, types, the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## Remove the environment, caches and build output
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "Pronk needs Python 3.11 or newer: install it, or name yours with make PYTHON=/path/to/python"; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }

# Where no NVIDIA GPU is visible, a CPU build of torch saves gigabytes of CUDA libraries: one that pip's own
# configuration has at hand, else PyTorch's CPU index. The range is the one in pyproject.toml.
$(VENV)/.torch: pyproject.toml | $(BIN)/python
	@torch=$$($(BIN)/python -c 'import tomllib; print(*(d for d in \
		tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))') && \
	if nvidia-smi -L >/dev/null 2>&1 || test -e /dev/nvidia0; then \
		echo "An NVIDIA GPU is visible: torch will come with CUDA"; \
	else \
		echo "No NVIDIA GPU is visible: installing the CPU build of $$torch" && \
		{ $(PIP) install --no-deps --no-index "$$torch" 2>/dev/null || \
		  $(PIP) install --no-deps --index-url $(CPU_INDEX) --retries 0 --timeout 10 "$$torch" 2>/dev/null || \
		  echo "$(CPU_INDEX) cannot be reached: torch comes with CUDA, several GB (to avoid that: Ctrl-C, $(BIN)/pip install a CPU build of torch, make again)"; }; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch
	@echo "Installing Pronk and what it needs"
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-test $(VENV)/.installed-dev: $(VENV)/.installed-%: $(VENV)/.torch
	@echo "Installing Pronk and what its $* extra needs"
	@$(PIP) install -e '.[$*]'
	@touch $@
