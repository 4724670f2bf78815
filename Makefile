# Everything a newcomer runs. The first target that needs it makes .venv from the pinned versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Accelerators are hidden from all tests but test-gpu, so that a suite means the same on every machine.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help .venv demo demo-resume cifar10 test test-full test-faults test-device test-gpu bench bench-quick check format clean

help:  ## this list
	@grep -hE '^[a-z.][a-z0-9.-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.venv: $(STAMP)  ## virtual environment with pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shardline needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Say which with: make PYTHON=python3.12")'
	@echo "Installing the pinned dependencies into .venv (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,examples]'
	@touch $@

# Each demo is a new run in a folder of its own; the same folder again would go on from its newest checkpoint.
RUN := runs/$(shell date +%Y%m%d-%H%M%S)

demo: .venv  ## train a small GPT on 2 processes: progress, figures, a picture
	$(BIN)/shardline run --nproc 2 examples/gpt/train.py --out $(RUN)-gpt $(ARGS)

demo-resume: .venv  ## the same, shorter: killed by SIGKILL half-way, resumed on 3 processes
	$(BIN)/python examples/gpt/kill_and_resume.py --out $(RUN)-gpt-killed $(ARGS)

cifar10: .venv  ## train the small CIFAR-10 network; options by ARGS="--stage 3 --dtype bf16"
	$(BIN)/shardline run --nproc 2 examples/cifar10/train.py $(ARGS)

test: .venv  ## the test suite
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-full: .venv  ## the test suite with the whole parity matrix, and what ranks say to each other over gloo alone
	$(PYTEST) -m "not gpu" $(ARGS)
	$(PYTEST) -m "not slow and not gpu" --transport gloo tests/spec tests/comm tests/test_parity.py $(ARGS)
	$(PYTEST) -m "not slow" --arrived --late-verdict tests/spec/test_01_swap.py tests/spec/test_06_edits.py tests/spec/test_07_uneven.py tests/spec/test_paths.py $(ARGS)

test-faults: .venv  ## checkpoints with the full matrices: layouts, kills, damage
	$(PYTEST) tests/checkpoint $(ARGS)

test-device: .venv  ## the path that a GPU takes, on a simulated device; needs a C++ compiler
	$(PYTEST) tests/device $(ARGS)

test-gpu: .venv  ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: .venv-bench/.installed  ## speed and memory beside DeepSpeed, FSDP2, DDP and the limit, about 25 minutes
	.venv-bench/bin/python benchmarks/bench.py $(ARGS)

bench-quick: .venv  ## does the benchmark itself work? A minute, with what .venv has
	$(BIN)/python benchmarks/bench.py --quick --rounds 1 --out runs/bench-quick $(ARGS)

# The peers, in an environment of their own.
.venv-bench/.installed: constraints.txt benchmarks/constraints.txt
	@echo "Installing the peers into .venv-bench ..."
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools numpy torch \
		pydantic safetensors tqdm matplotlib
	@DS_BUILD_OPS=0 .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -c benchmarks/constraints.txt deepspeed
	@touch $@

check: .venv  ## formatting, lint, types, import levels
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv  ## format and sort imports in place
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything that was made
	rm -rf .venv .venv-bench build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
