# Everything a newcomer runs. The first target that needs it makes .venv from the pinned versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Accelerators are hidden from all tests but test-gpu, so that a suite means the same on every machine.
# Bytecode is written even where the caller's environment forbids it: tests start some hundred interpreters.
PYTEST := CUDA_VISIBLE_DEVICES= PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# What goes another way where the host reads a step's verdict late.
LATE := --arrived --late-verdict tests/spec/test_01_swap.py tests/spec/test_06_edits.py tests/spec/test_07_uneven.py \
	tests/engine/test_ema.py
# In front of what needs the simulated device.
COMPILED := command -v $${CXX:-g++} >/dev/null || { echo "SKIPPED, no C++ compiler: the simulated device. Install one \
(Debian: g++), or name yours in CXX."; exit 0; };

.DEFAULT_GOAL := help
.PHONY: help .venv demo demo-resume cifar10 test test-full test-faults test-deepspeed test-integrations test-device test-late test-gpu gpu-first gpu-wheels docs dist bench bench-quick bench-trainer check lint format clean

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

demo: .venv  ## train a small GPT on 2 processes: progress, figures, a picture, a report
	$(BIN)/shardline run --nproc 2 examples/gpt/train.py --out $(RUN)-gpt $(ARGS)
	$(BIN)/shardline report $(RUN)-gpt

demo-resume: .venv  ## the same, shorter: killed by SIGKILL half-way, resumed on 3 processes
	$(BIN)/python examples/gpt/kill_and_resume.py --out $(RUN)-gpt-killed $(ARGS)

cifar10: .venv  ## train the small CIFAR-10 network; options by ARGS="--stage 3 --dtype bf16"
	$(BIN)/shardline run --nproc 2 examples/cifar10/train.py $(ARGS)

test: .venv  ## the test suite
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-full: .venv  ## the test suite with the whole parity matrix, and what ranks say to each other over gloo alone
	$(PYTEST) -m "not gpu" $(ARGS)
	$(PYTEST) -m "not slow and not gpu" --transport gloo tests/spec tests/comm tests/test_parity.py $(ARGS)
	$(PYTEST) -m "not slow and not gpu" $(LATE) tests/spec/test_paths.py $(ARGS)
	@$(COMPILED) $(PYTEST) tests/device $(ARGS)
	@$(COMPILED) SIMCUDA=1 $(BIN)/python benchmarks/gpu_first.py

test-faults: .venv  ## checkpoints with the full matrices: layouts, kills, damage
	$(PYTEST) tests/checkpoint $(ARGS)

test-deepspeed: .venv-integrations/.installed .venv-bench/.installed  ## scripts written for DeepSpeed, with the real trainers, and beside DeepSpeed itself
	CUDA_VISIBLE_DEVICES= DEEPSPEED_PYTHON=.venv-bench/bin/python .venv-integrations/bin/python -m pytest -m "not gpu" tests/compat $(ARGS)

test-integrations: .venv-integrations/.installed  ## Shardline in Transformers' Trainer, Accelerate, Lightning, PEFT and TRL, with the real packages
	CUDA_VISIBLE_DEVICES= .venv-integrations/bin/python -m pytest -m "not gpu" tests/integrations $(ARGS)

# The trainers, in an environment of their own.
.venv-integrations/.installed: pyproject.toml constraints.txt tests/compat/constraints.txt
	@echo "Installing the trainers into .venv-integrations ..."
	@test -x .venv-integrations/bin/python || $(PYTHON) -m venv .venv-integrations
	@.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	@.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -c tests/compat/constraints.txt -e '.[integrations]' torchdata numpy pytest pytest-timeout
	@touch $@

test-device: .venv  ## the path that a GPU takes, on a simulated device; needs a C++ compiler
	@$(COMPILED) $(PYTEST) tests/device $(ARGS)

test-late: .venv  ## orders, edits and uneven batches of the spec, with verdicts read late, as on a GPU
	$(PYTEST) -m "not slow and not gpu" $(LATE) $(ARGS)

test-gpu: .venv  ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu $(ARGS)

HAS_TORCH := $(PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'

# For a machine with a GPU and no package index: its own Python runs this if it has torch, and takes from wheels/ what
# else is missing. SIMCUDA=1 runs it on a simulated device.
gpu-first:  ## the first 9 minutes on a machine with one GPU; report in runs/gpu-first
	@$(HAS_TORCH) || $(MAKE) --no-print-directory .venv
	@if $(HAS_TORCH); then python=$(PYTHON); else python=$(BIN)/python; fi; $$python benchmarks/gpu_first.py $(ARGS)

gpu-wheels:  ## what gpu-first needs beside torch, as wheels for Python 3.12 on Linux, in wheels/
	rm -rf wheels
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --only-binary=:all: --dest wheels -c constraints.txt \
		--implementation cp --python-version 3.12 \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		pydantic safetensors tqdm zlib-ng pytest pytest-timeout hypothesis

bench: .venv-bench/.installed  ## speed and memory beside DeepSpeed, FSDP2, DDP and the limit, about 25 minutes
	.venv-bench/bin/python benchmarks/bench.py $(ARGS)

bench-quick: .venv  ## does the benchmark itself work? A minute, with what .venv has
	$(BIN)/python benchmarks/bench.py --quick --rounds 1 --out runs/bench-quick $(ARGS)

bench-trainer: .venv-integrations/.installed .venv-bench/.installed  ## a step of Transformers' Trainer beside DDP and DeepSpeed, about 15 minutes
	DEEPSPEED_PYTHON=.venv-bench/bin/python .venv-integrations/bin/python benchmarks/trainer.py --write $(ARGS)

# The peers, in an environment of their own.
.venv-bench/.installed: constraints.txt benchmarks/constraints.txt tests/compat/constraints.txt
	@echo "Installing the peers into .venv-bench ..."
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools numpy torch \
		pydantic safetensors tqdm matplotlib
	@DS_BUILD_OPS=0 .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -c benchmarks/constraints.txt -c tests/compat/constraints.txt deepspeed transformers accelerate
	@touch $@

docs: .venv-docs/.installed  ## the documentation site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "The site is in build/site; look at it with: .venv-docs/bin/mkdocs serve"

# What the extra "docs" names, in an environment of its own: it needs neither torch nor the package.
.venv-docs/.installed: pyproject.toml docs/constraints.txt
	@echo "Installing what the site needs into .venv-docs ..."
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c docs/constraints.txt $$(.venv-docs/bin/python \
		-c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

dist: .venv-dist/.installed  ## sdist and wheel in dist/, installed into an empty environment, where one step is trained
	rm -rf dist build/empty
	.venv-dist/bin/python -m build --outdir dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/shardline-*.whl
	cd build/empty && bin/python ../../tests/one_step.py && bin/shardline run --nproc 2 ../../tests/one_step.py && bin/shardline --version

.venv-dist/.installed: constraints.txt
	@test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	@.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build
	@touch $@

check: lint  ## formatting, lint, types, import levels, sizes, and depth of the call stack down to a collective
	$(PYTEST) -q tests/test_call_depth.py

lint: .venv  ## what of it runs no code of the package
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/budgets.py

format: .venv  ## format and sort imports in place
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything that was made
	rm -rf .venv .venv-bench .venv-docs .venv-dist .venv-integrations build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
