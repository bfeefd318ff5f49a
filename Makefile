# `make test` and `make demo` need Python 3.10 or later and, for the compiled extension, a C++ compiler. The rest they
# install into .venv, once.

PYTHON ?= python3
PYTEST_ARGS ?=
KERNEL_ARGS ?=
GPU_ARGS ?=

VENV := .venv
VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help install test kernels sanitize gpu demo lint clean

help:
	@echo "make install   set up $(VENV): pinned dependencies and this package, editable"
	@echo "make test      all tests; PYTEST_ARGS='-k packaging' chooses some"
	@echo "make kernels   compile every kernel, Triton's for sm_80, sm_90, sm_100 and gfx942, CUDA's where there is nvcc, and"
	@echo "               check the machine code; needs no GPU; KERNEL_ARGS='--only rf_rmsprop --all' chooses some"
	@echo "make sanitize  run the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gpu       on a machine with a GPU, in \$$(PYTHON)'s own environment: install this package in place, run the"
	@echo "               tests that need a GPU, then measure every kernel; GPU_ARGS='--quick --only graphs' chooses"
	@echo "make demo      train a small language model with AdamW, RFRMSProp and IFShampoo"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove $(VENV), builds and caches"
	@echo
	@echo "test, kernels, sanitize, demo and lint run install first where it is due. PYTHON=python3.12 chooses the interpreter,"
	@echo "ROOTFREE_BUILD=none|cpu|cuda what is compiled (make clean before a change of either)."

install: $(STAMP)

test: $(STAMP)
	@$(VPY) -m pytest $(PYTEST_ARGS)

kernels: $(STAMP)
	@$(VPY) -m bench.compile_kernels $(KERNEL_ARGS)
	@$(VPY) -m bench.compile_cuda $(KERNEL_ARGS)

sanitize: $(STAMP)
	@.ci/sanitize

# No .venv here: PYTHON is the one that has PyTorch and Triton for the GPU, and nothing is fetched.
gpu:
	@$(PYTHON) -m bench.gpu_machine
	@$(PYTHON) -m pytest -m gpu $$($(PYTHON) -m bench.gpu_machine --ignored) $(PYTEST_ARGS)
	@$(PYTHON) -m bench.kernels $(GPU_ARGS)

demo: $(STAMP)
	@$(VPY) -m bench.demo

lint: $(STAMP)
	@$(VPY) -m ruff check .
	@$(VPY) -m ruff format --check .
	@$(VPY) -m mypy rootfree_kernels

clean:
	rm -rf $(VENV) build dist *.egg-info rootfree_kernels/_C.*so rootfree_kernels/_build.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench csrc rootfree_kernels tests triton_kernels -name __pycache__ -prune -exec rm -rf {} +

# PyTorch comes before the package: the extension is compiled against the very version that will run it.
$(STAMP): $(BUILD_INPUTS) | $(VPY)
	@echo "installing the pinned dependencies and rootfree-kernels (again only when they change) ..."
	@$(PIP) install -c constraints.txt torch setuptools wheel pybind11 ninja
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev,bench]'
	@$(VPY) -m rootfree_kernels
	@touch $@

$(VPY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
