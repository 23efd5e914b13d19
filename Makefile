# `make demo` and `make test` need Python (3.11 or later) and an index that pip can reach, nothing else.
# A CPU build of PyTorch from another index:  make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_TORCH ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test chromium lint bench trust fuzz oldest audit wheel clean

help:
	@echo "make demo   create $(VENV), install, run the demo (DEMO_ARGS='--text \"...\"' passes options on)"
	@echo "make test   create $(VENV), install, check the style, run all tests"
	@echo "make chromium  install the browser in which the tests open the report's page: Debian's package, as root"
	@echo "make lint   ruff and mypy alone"
	@echo "make bench  measure the figures of docs/performance.md again: over an hour, on a machine with nothing else to do"
	@echo "make trust  measure the figures of docs/reliability.md again: damaged adapters, killed runs; 20 minutes"
	@echo "make fuzz   the property tests with fresh random examples, many more of them"
	@echo "make oldest the core tests on the oldest supported versions, in an environment of its own"
	@echo "make audit  known vulnerabilities of the pinned packages, and their licences"
	@echo "make wheel  build the wheel, twice, and compare"
	@echo "make clean  remove $(VENV) and what the tools cache"

demo: $(VENV)/demo.installed
	$(OFFLINE) $(BIN)/craft-peft demo $(DEMO_ARGS)

# Files in the order of their names: else the few long tests of some would run alone at the end.
test: lint
	$(OFFLINE) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Elsewhere `.venv/bin/playwright install chromium`, or any Chromium named by CRAFT_CHROMIUM.
chromium:
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null; }

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
	$(OFFLINE) $(BIN)/python benchmarks/decompose.py 12x8192 16x8192 --sides auto --memory --rounds 1 \
		--output $(FIGURES)/decompose-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/bank.py --output $(FIGURES)/bank-cpu.json
	$(OFFLINE) $(BIN)/python benchmarks/load.py --output $(FIGURES)/load-cpu.json
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python docs/build.py

trust: $(VENV)/dev.installed
	$(OFFLINE) $(BIN)/python trust/mutants.py --count 100000 --output results/trust.json
	$(OFFLINE) $(BIN)/python trust/kills.py --kills 200 --output results/trust.json
	$(OFFLINE) $(BIN)/python trust/soak.py --cycles 2000 --output results/trust.json
	$(BIN)/python docs/build.py

fuzz: $(VENV)/dev.installed
	$(OFFLINE) $(BIN)/python -m pytest -n auto tests/test_fuzz.py --hypothesis-profile=fuzz

# The ranges of pyproject.toml from below; the benchmark and the tests that need newer libraries are left out.
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet $(PIP_TORCH) "torch==$(or $(OLDEST_TORCH),2.4.0)" "numpy<2.3"
	$(VENV)-oldest/bin/python -m pip install --quiet peft==0.20.0 transformers==4.57.1 "jaxtyping==0.2.34" \
		beartype hypothesis pytest pytest-xdist --editable .
	$(OFFLINE) $(VENV)-oldest/bin/python -m pytest -n auto -W "ignore:Could not find a config file:UserWarning" \
		tests/test_tucker.py tests/test_fused.py tests/test_laws.py tests/test_loading.py \
		tests/test_released_adapters.py tests/test_lora_export.py

audit: $(VENV)/dev.installed
	$(BIN)/python -m pip_audit --strict --no-deps --disable-pip --requirement constraints.txt
	$(BIN)/python docs/licences.py --check

wheel: $(VENV)/dev.installed
	rm -rf dist build/again
	for place in dist build/again; do \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PIP_CONSTRAINT=constraints.txt \
			$(BIN)/python -m build --wheel --outdir $$place || exit 1; \
	done
	cmp dist/*.whl build/again/*.whl

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
