# Every target makes its environment first, from constraints.txt. PYTHON chooses the interpreter for it.
# On a machine without network, `make gpu BIN=/path/to/bin` uses the python3 there as it is.
PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
OUT ?= out
OLDEST := .venv-oldest
OPS := $(patsubst %,tests/test_%.py,scores select nearest merge compact compress ops bad_input rules golden dispatch fp8 autotune)

.PHONY: demo test test-oldest lint format bench gpu clean help

help:
	@echo "make demo         a small vision-language model on a compressed cache; a table and a picture in $(OUT)/"
	@echo "make test         all tests"
	@echo "make test-oldest  the model families on the oldest transformers that is supported"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff rewrite what it can"
	@echo "make bench        benchmarks of this machine's processor"
	@echo "make gpu          tests, benchmarks and compute-sanitizer on a GPU; results in $(OUT)/"
	@echo "make clean        remove environments and build output"

demo: $(VENV)/.ready
	$(BIN)/lookm demo --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/python -m pytest --durations=10
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(OPS)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/test_families.py tests/test_cache.py tests/test_enable.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	LOOKM_BENCH_RESULTS=benchmarks/results/cpu $(BIN)/python -m pytest benchmarks/bench_reference.py

gpu: $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.ready)
	$(BIN)/python3 benchmarks/gpu.py $(OUT)

clean:
	rm -rf $(VENV) $(OLDEST) build dist out *.egg-info

define new_environment
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed for development, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --upgrade --progress-bar on --constraint $(2) --editable ".[dev,bench]"
	@touch $(1)/.ready
endef

$(VENV)/.ready: constraints.txt pyproject.toml
	$(call new_environment,$(VENV),constraints.txt)

$(OLDEST)/.ready: constraints-oldest.txt pyproject.toml
	$(call new_environment,$(OLDEST),constraints-oldest.txt)
