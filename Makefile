# Every target does its own set-up: a virtual environment, the pinned dependencies, the compiled extension.
# Needs Python 3.10-3.12, make and g++. Nothing is done again while nothing changed.

VENV ?= .venv
SEED ?= 0
PYTHON ?= python3.11 python3.12 python3.10 python3 python

BIN := $(VENV)/bin
# ninja is in the virtual environment; a relative entry would be lost on the way through pip and ninja.
export PATH := $(abspath $(BIN)):$(PATH)
# Idle OpenMP threads that spin take the cores from each other: beside one busy process a training step took 16 times
# as long.
export OMP_WAIT_POLICY ?= PASSIVE
# A compiler error is an error here, not a slower package. With GOL_KERNELS_NO_EXT=1 nothing is compiled.
ifndef GOL_KERNELS_NO_EXT
export GOL_KERNELS_FORCE_EXT ?= 1
endif

# Without a GPU the CUDA kernels cannot run: where there is a compiler for them, one architecture shows that they build.
ifeq ($(shell command -v nvidia-smi),)
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

DEMO_DATA := data/demo-seed$(SEED)
DEMO_RUN := runs/demo-seed$(SEED)

help:  ## show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/extension  ## make a small long-tailed data set, train on it with GOL, evaluate, draw (SEED=0)
	$(BIN)/python -m detector make-synthetic $(DEMO_DATA) --config demo --seed $(SEED)
	$(BIN)/python -m detector train --config demo --output $(DEMO_RUN) --overwrite \
	    seed=$(SEED) data.root=$(DEMO_DATA)
	@echo "This was a small made-up set: it shows that the whole path works and learns, not which loss is best."
	@echo "Look at $(DEMO_RUN)/predictions.png and $(DEMO_RUN)/plots."

test: $(VENV)/extension  ## run the whole test suite (ARGS="-k seesaw": a part of it)
	$(BIN)/python -m gol_kernels.info
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/extension  ## compare the kernels with eager and compiled PyTorch on this machine
	$(BIN)/python -m bench
	$(BIN)/python -m pytest bench/test_microbench.py

lint: $(VENV)/packages  ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)

format: $(VENV)/packages  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

clean:  ## remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache gol_kernels/_C*.so

$(VENV)/python:
	@for python in $(PYTHON); do \
	    if $$python -c "import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))" 2>/dev/null; \
	    then $$python -m venv $(VENV) && touch $@ && exit 0; fi; \
	done; \
	echo "no Python 3.10-3.12 with the venv and ensurepip modules among: $(PYTHON); set PYTHON=..." >&2; exit 1

# The editable install is made without the extension, which the next rule compiles where ninja can reuse old objects.
$(VENV)/packages: $(VENV)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt setuptools ninja
	GOL_KERNELS_FORCE_EXT= GOL_KERNELS_NO_EXT=1 \
	    $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[detector,test,lint]'
	@touch $@

$(VENV)/extension: $(VENV)/packages setup.py gol_kernels/__init__.py $(shell find csrc -type f)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@

.PHONY: help demo test bench lint format clean
