# `make help` lists the targets. Most of them first set up .venv, which needs Python 3.10 or later. A C++ compiler is needed
# for the compiled extension only.

PYTHON ?= python3
PYTEST_ARGS ?=
KERNEL_ARGS ?=
BENCH_ARGS ?=
PROFILE_ARGS ?=
STAGES ?=

# Versions on the GPU machine, for which `make gpu-bundle` compiles.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= 2.11.0
GPU_TRITON ?= 3.6.0

VENV := .venv
VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed-$(GPU_TORCH)-$(GPU_TRITON)
ON_FAKE_GPU := python -m pytest -p tests.fake_gpu.plugin -p no:cacheprovider -q --timeout 300
FAKE_GPU := $(GPU_VENV)/bin/python tests/fake_gpu $(ON_FAKE_GPU)
FAKE_GPU_PAIR := $(GPU_VENV)/bin/python tests/fake_gpu --devices 2 $(ON_FAKE_GPU)
# The oldest Triton that pyproject.toml allows. `make kernels` checks it as well as the pinned one.
OLDEST_TRITON := 3.6.0
OLDEST := $(CURDIR)/$(VENV)/triton-$(OLDEST_TRITON)
CIBUILDWHEEL := 4.3.5
WHEEL_VENV := .venv-wheels
WHEEL_STAMP := $(WHEEL_VENV)/.installed-$(CIBUILDWHEEL)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard build_support/*.py csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help install test lint types docs kernels sanitize fake-gpu demo bench bench-pytest profile peers
.PHONY: gpu gpu-bench gpu-bundle dist wheels clean

help:
	@echo "Set up"
	@echo "  make install       install this package (editable) and its pinned dependencies into $(VENV)"
	@echo "  make clean         remove virtual environments, builds and caches"
	@echo
	@echo "Check"
	@echo "  make test          run all tests                                    PYTEST_ARGS='-k packaging'"
	@echo "  make lint          run ruff and mypy (make types: only mypy)"
	@echo "  make docs          build the documentation into build/docs; warnings are errors"
	@echo "  make kernels       compile all GPU kernels, check the machine code  KERNEL_ARGS='--only rf_rmsprop'"
	@echo "  make sanitize      test the C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "  make fake-gpu      run the GPU tests on a fake GPU that computes nothing (installs 5 GB)"
	@echo
	@echo "Measure"
	@echo "  make demo          train a small language model with AdamW, Muon and IFShampoo"
	@echo "  make bench         compare all optimizers on this CPU               BENCH_ARGS='--only 1024 --sections steps'"
	@echo "  make bench-pytest  time steps relative to a reference operation     PYTEST_ARGS='--benchmark-compare'"
	@echo "  make profile       measure the phases of a step on this CPU         PROFILE_ARGS='--optimizer RFRMSProp'"
	@echo "  make peers         install the optimizers to compare with"
	@echo
	@echo "On a machine with a GPU (in the environment of PYTHON; nothing is downloaded)"
	@echo "  make gpu           run tests, measurements and profiles             STAGES='machine tests quick:120'"
	@echo "  make gpu-bench     compare all optimizers                           BENCH_ARGS='...'"
	@echo "  make gpu-bundle    before, on another machine: compile everything that make gpu needs (installs 5 GB)"
	@echo
	@echo "Release"
	@echo "  make dist          build the source distribution and the wheel in pure Python into dist, and check them"
	@echo "  make wheels        build the wheels with the compiled extension into dist (needs Docker)"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter, ROOTFREE_BUILD=none|cpu|cuda what is compiled. Run make clean before a"
	@echo "change of either."

install: $(STAMP)

test: $(STAMP)
	@$(VPY) -m pytest $(PYTEST_ARGS)

kernels: $(STAMP) $(OLDEST)/.installed
	@$(VPY) -m bench.gate.triton $(KERNEL_ARGS)
	@PYTHONPATH="$(OLDEST)$${PYTHONPATH:+:$$PYTHONPATH}" $(VPY) -m bench.gate.triton $(KERNEL_ARGS)
	@$(VPY) -m bench.gate.cuda $(KERNEL_ARGS)

sanitize: $(STAMP)
	@.ci/sanitize

# These use PYTHON itself, which has PyTorch and Triton for the GPU, and not .venv.
gpu:
	@$(PYTHON) -m bench.gpu_run $(STAGES)

gpu-bundle: $(GPU_STAMP)
	@$(GPU_VENV)/bin/python -m bench.gpu_run.bundle

fake-gpu: $(GPU_STAMP)
	@$(FAKE_GPU) -n 2 -m gpu -k 'not more_than_2_31' $(PYTEST_ARGS)
	@$(FAKE_GPU_PAIR) -m fake_gpu $(PYTEST_ARGS)

demo: $(STAMP)
	@$(VPY) -m bench.demo

peers: $(STAMP)
	@$(VPY) -m bench.common.peers --install

bench: $(STAMP)
	@$(VPY) -m bench.compare $(BENCH_ARGS)

gpu-bench:
	@$(PYTHON) -m bench.gpu_run.machine
	@$(PYTHON) -m bench.compare --device cuda $(BENCH_ARGS)

bench-pytest: $(STAMP)
	@$(VPY) -m pytest bench/steps/benchmarks --benchmark-autosave $(PYTEST_ARGS)

profile: $(STAMP)
	@$(VPY) -m bench.profile --device cpu $(PROFILE_ARGS)

# -E reads all pages again. Otherwise warnings of unchanged pages would not be repeated.
docs: $(DOCS_STAMP)
	@$(VPY) -m sphinx -E -q -W --keep-going docs build/docs
	@echo "built build/docs/index.html"

lint: $(STAMP)
	@$(VPY) -m ruff check .
	@$(VPY) -m ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy has to find triton_kernels/ inside the package, from where it is imported.
types: $(STAMP)
	@trap 'rm -f rootfree_kernels/triton_kernels' EXIT; ln -sfn ../triton_kernels rootfree_kernels/triton_kernels; \
	  $(VPY) -m mypy rootfree_kernels

# The wheel is built from the source distribution, in an isolated environment without PyTorch.
dist: $(STAMP)
	@rm -rf dist
	@ROOTFREE_BUILD= $(VPY) -m build --outdir dist . > /dev/null
	@$(VPY) -m tests.tools.check_dist dist

wheels: $(WHEEL_STAMP)
	@$(WHEEL_VENV)/bin/cibuildwheel --platform linux --output-dir dist

clean:
	rm -rf $(VENV) $(GPU_VENV) $(WHEEL_VENV) .gpu-bundle build dist *.egg-info rootfree_kernels/_C.*so rootfree_kernels/_build*.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench build_support csrc docs rootfree_kernels tests triton_kernels -name __pycache__ -prune -exec rm -rf {} +

# PyTorch is installed first, because the extension is compiled against it.
$(STAMP): $(BUILD_INPUTS) | $(VPY)
	@echo "installing the pinned dependencies and rootfree-kernels (again only when they change) ..."
	@$(PIP) install -c constraints.txt torch setuptools wheel pybind11 ninja
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev,bench]'
	@$(VPY) -m rootfree_kernels
	@touch $@

# The dependencies "docs" of pyproject.toml, which only `make docs` needs.
$(DOCS_STAMP): $(STAMP)
	@echo "installing Sphinx (again only when the dependencies change) ..."
	@$(PIP) install -c constraints.txt $$($(VPY) -c 'import importlib.metadata as metadata; \
	  found = [r.split(";") for r in metadata.requires("rootfree-kernels")]; \
	  print(*[name for name, *marker in found if "docs" in "".join(marker)])')
	@touch $@

$(GPU_STAMP): $(BUILD_INPUTS) bench/gpu_run/requirements.txt | $(GPU_VENV)/bin/python
	@echo "installing PyTorch $(GPU_TORCH) for CUDA and rootfree-kernels (again only when they change) ..."
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install torch==$(GPU_TORCH) triton==$(GPU_TRITON) \
	  -r bench/gpu_run/requirements.txt
	@ROOTFREE_BUILD=cuda $(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation \
	  --no-deps -e .
	@touch $@

$(WHEEL_STAMP):
	@echo "installing cibuildwheel $(CIBUILDWHEEL) (once) ..."
	@$(PYTHON) -m venv --clear $(WHEEL_VENV)
	@$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check --quiet install cibuildwheel==$(CIBUILDWHEEL)
	@touch $@

$(GPU_VENV)/bin/python:
	@$(GPU_PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: there is no working $(GPU_PYTHON); name the GPU machine's Python: make GPU_PYTHON=python3.12"; exit 1; }
	@$(GPU_PYTHON) -m venv $(GPU_VENV)

# A second Triton in a folder of its own. It is imported if this folder is on PYTHONPATH.
$(OLDEST)/.installed: | $(VPY)
	@echo "installing Triton $(OLDEST_TRITON) in $(VENV)/triton-$(OLDEST_TRITON), for make kernels (once) ..."
	@rm -rf "$(OLDEST)"
	@$(PIP) install --no-deps --target "$(OLDEST)" triton==$(OLDEST_TRITON)
	@touch "$@"

$(VPY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
