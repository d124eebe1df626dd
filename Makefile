# Every target makes its environment first, from constraints.txt. PYTHON chooses the interpreter for it.
# On a machine without network, `make gpu BIN=/path/to/bin` uses the python3 there as it is.
PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
OUT ?= out
OLDEST := .venv-oldest
NEWEST := .venv-newest
# what a release of transformers can break
RELEASE := $(patsubst %,tests/test_%.py,families cache enable tensor_parallel device_map)
OPS := $(patsubst %,tests/test_%.py,scores select nearest merge compact compress pivots_and_votes kept_attention quantize quantized_attention ops bad_input rules golden dispatch fp8 autotune)

CSRC := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp)
CPP := $(CSRC) $(wildcard $(addprefix tests/emulator/,*.h *.cpp cub/*/*.cuh))

.PHONY: demo test test-suite test-interpreted test-oldest test-newest test-install families quality lint format bench gpu wheel clean help

help:
	@echo "make demo         a small vision-language model on a compressed cache; a table and a picture in $(OUT)/"
	@echo "make test         all tests"
	@echo "make test-oldest  the model families on the oldest transformers that is supported"
	@echo "make test-newest  the same on the newest transformers that the index has now"
	@echo "make test-install every way to install the package, with and without nvcc"
	@echo "make families     every model class of transformers through the same checks; the record of the README's table"
	@echo "make quality      every policy on the test beds; the tables of benchmarks/quality/README.md"
	@echo "make lint         ruff, mypy and clang-format"
	@echo "make format       let ruff and clang-format rewrite what they can"
	@echo "make bench        benchmarks of this machine's processor"
	@echo "make gpu          tests, benchmarks and compute-sanitizer on a GPU; results in $(OUT)/"
	@echo "make wheel        sdist and wheel in dist/, with the CUDA extension where there is an nvcc"
	@echo "make clean        remove environments and build output"

demo: $(VENV)/.ready
	$(BIN)/lookm demo --out $(OUT)

# two halves, which make -j2 runs beside each other
test: test-suite test-interpreted

test-suite: $(VENV)/.ready
	$(BIN)/python -m pytest --durations=10

test-interpreted: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(OPS)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(RELEASE)

# an upgrade at every call, beyond the package's own upper bound too: a new release must show here first
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pip install --upgrade --constraint constraints-newest.txt transformers
	$(NEWEST)/bin/python -m pytest $(RELEASE)

test-install: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_install.py -m install --durations=0

# afterwards, python benchmarks/report.py writes the README's table
families: $(VENV)/.ready
	PYTHONPATH=benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m every_model

quality: $(VENV)/.ready
	$(BIN)/python benchmarks/quality/measure.py --split final
	$(BIN)/python benchmarks/quality/formats.py
	$(BIN)/python benchmarks/quality/streaming.py
	$(BIN)/python benchmarks/report.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.ready
	LOOKM_BENCH_RESULTS=benchmarks/results/cpu $(BIN)/python -m pytest benchmarks/bench_reference.py benchmarks/bench_generate.py

gpu: $(if $(filter $(VENV)/bin,$(BIN)),$(VENV)/.ready)
	$(BIN)/python3 benchmarks/gpu.py $(OUT)

# for the Linux of this machine and newer ones; .github/workflows/wheels.yml builds those for old ones too
wheel: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build
	for wheel in $$(ls dist/*-linux_*.whl 2>/dev/null); do \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libcuda.so.1 --wheel-dir dist $$wheel && rm $$wheel || exit; done
	@du -h --apparent-size dist/*

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist out *.egg-info lookm_kernels/_build.json lookm_kernels/_C.*

define new_environment
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed for development, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(1)
	# with nvcc, the extension for one architecture, which is quicker; newer GPUs run its PTX
	LOOKM_CUDA_ARCHS=$${LOOKM_CUDA_ARCHS:-80} $(1)/bin/python -m pip install --upgrade --progress-bar on --constraint $(2) --editable ".[$(3)]"
	@touch $(1)/.ready
endef

$(VENV)/.ready: constraints.txt pyproject.toml setup.py CMakeLists.txt $(CSRC)
	$(call new_environment,$(VENV),constraints.txt,dev)

$(OLDEST)/.ready: constraints-oldest.txt pyproject.toml setup.py CMakeLists.txt $(CSRC)
	$(call new_environment,$(OLDEST),constraints-oldest.txt,test)

$(NEWEST)/.ready: constraints-newest.txt pyproject.toml setup.py CMakeLists.txt $(CSRC)
	$(call new_environment,$(NEWEST),constraints-newest.txt,test)
