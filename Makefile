# `make demo` and `make test` need Python (3.11 or later) and an index that pip can reach, nothing else.
# A CPU build of PyTorch from another index:  make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_TORCH ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   create $(VENV), install, run the demo (DEMO_ARGS='--text \"...\"' passes options on)"
	@echo "make test   create $(VENV), install, check the style, run all tests"
	@echo "make lint   ruff and mypy alone"
	@echo "make bench  measure the figures of docs/performance.md again: over an hour, on a machine with nothing else to do"
	@echo "make clean  remove $(VENV) and what the tools cache"

demo: $(VENV)/demo.installed
	$(OFFLINE) $(BIN)/craft-peft demo $(DEMO_ARGS)

test: lint
	$(OFFLINE) $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

FIGURES := results/performance

bench: $(VENV)/dev.installed
	$(OFFLINE) $(BIN)/python benchmarks/step.py --output $(FIGURES)/step-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/decompose.py 12x768 24x768 6x768 12x384 12x1024 24x1024 --adapt \
		--output $(FIGURES)/decompose-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/decompose.py 32x4096 --sides auto hosvd --rounds 1 --output $(FIGURES)/decompose-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/decompose.py 2x8192 4x8192 --sides auto --memory --rounds 1 \
		--output $(FIGURES)/decompose-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/bank.py --output $(FIGURES)/bank-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/load.py --output $(FIGURES)/load-cpu.json
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python docs/build.py

# torch first and by itself, so that no other package's range chooses a bigger build.
$(VENV)/torch.installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) found; the pinned environment needs Python 3.11 or later: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_TORCH) torch==2.13.0
	@touch $@

$(VENV)/%.installed: $(VENV)/torch.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
