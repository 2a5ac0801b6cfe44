# Two commands are all a fresh machine needs (Python 3.11 or later, a C compiler, make):
#   make demo   sets everything up and runs the main job
#   make test   sets everything up and passes the tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# several threads on few busy cores are slower than one; `make demo` divides the cores among its workers itself
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.PHONY: demo test test-all results lit mamba proxy bench lint types docs docs-check setup setup-dev clean

demo: setup
	$(BIN)/inlay compare recipes/demo.yaml

test: setup-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

# long checks: all pairs of methods, peers, quality tables
test-all: setup-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# every method on five real tasks: hours, but what is trained is kept and never trained again
results: setup
	$(BIN)/python benchmarks/methods.py

# a small Mamba trained on novels, then adapted to plays; mamba.py is a faster scan for machines without its kernels
mamba: setup
	$(PIP) install --quiet --constraint constraints.txt --editable ".[mamba]"
	$(BIN)/python benchmarks/mamba.py pretrain
	$(BIN)/python benchmarks/mamba.py adapt

# two small image-text models, trained here because no registry carries one: some minutes of one core each
lit: setup
	$(BIN)/inlay models fetch lit-mobilenetv2
	$(BIN)/inlay models fetch lit-dinov2-small

# a small tuned and untuned pair steers a larger frozen decoder: about a quarter of an hour on one quiet core
proxy: setup
	$(BIN)/python benchmarks/proxy.py

# what a step, a mixed batch, an epoch above frozen layers, a start and a merge cost beside peft: an hour of quiet cores
bench: setup-dev
	$(BIN)/python benchmarks/step.py --model minilm
	$(BIN)/python benchmarks/mixed.py
	$(BIN)/python benchmarks/prefix.py
	$(BIN)/python benchmarks/start.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

docs: setup-dev
	$(TEST_ENV) $(BIN)/python docs/build.py

docs-check: setup-dev
	$(TEST_ENV) $(BIN)/python docs/build.py --check

setup: $(VENV)/.setup
setup-dev: $(VENV)/.setup-dev

# torch first and pinned: a looser request may bring a build with gigabytes of accelerator libraries
$(VENV)/.setup: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable ".[gguf]"
	touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
