# `make test`, `make demo` and `make bench` need Python 3.10 or later and, for the compiled extension, a C++ compiler. The
# rest they install into .venv, once.

PYTHON ?= python3
PYTEST_ARGS ?=
KERNEL_ARGS ?=
STAGES ?=
GPU_PYTHON ?= python3.12
BENCH_ARGS ?=
PROFILE_ARGS ?=

# What the GPU machine runs: `make gpu-bundle` compiles for these.
GPU_TORCH ?= 2.11.0
GPU_TRITON ?= 3.6.0

VENV := .venv
VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed-$(GPU_TORCH)-$(GPU_TRITON)
ON_FAKE_GPU := python -m pytest -p tests.fake_gpu.plugin -p no:cacheprovider -q --timeout 300
FAKE_GPU := $(GPU_VENV)/bin/python tests/fake_gpu $(ON_FAKE_GPU)
FAKE_GPU_PAIR := $(GPU_VENV)/bin/python tests/fake_gpu --devices 2 $(ON_FAKE_GPU)
# The compile gate runs with the pinned Triton and with this one, the oldest that pyproject.toml allows.
OLDEST_TRITON := 3.6.0
OLDEST := $(CURDIR)/$(VENV)/triton-$(OLDEST_TRITON)
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help install test kernels sanitize gpu gpu-bundle fake-gpu demo peers bench gpu-bench bench-pytest profile lint clean

help:
	@echo "make install   set up $(VENV): pinned dependencies and this package, editable"
	@echo "make test      all tests; PYTEST_ARGS='-k packaging' chooses some"
	@echo "make kernels   compile every kernel, Triton's for sm_80, sm_90, sm_100 and gfx942, CUDA's where there is nvcc, and"
	@echo "               check the machine code, with the pinned Triton and with $(OLDEST_TRITON); needs no GPU;"
	@echo "               KERNEL_ARGS='--only rf_rmsprop --all' chooses some"
	@echo "make sanitize  run the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gpu       on a machine with a GPU, in \$$(PYTHON)'s own environment: tests, measurements, profiles and a language"
	@echo "               model, in stages of 12 minutes together; STAGES='machine tests quick:120' chooses some"
	@echo "make gpu-bundle  without a GPU: compile what such a machine needs (PyTorch $(GPU_TORCH), Triton $(GPU_TRITON), the Python of"
	@echo "               GPU_PYTHON) into .gpu-bundle/, which make gpu uses there; installs 5 GB into $(GPU_VENV) once"
	@echo "make fake-gpu  run the tests that need a GPU on one that computes nothing: launches, devices, streams, graphs"
	@echo "make demo      train a small language model with AdamW, Muon and IFShampoo"
	@echo "make peers     install what a package index offers of the optimizers to compare with, and say which are there"
	@echo "make bench     every optimizer side by side on this machine, in under 10 minutes: a page, JSON and plots in"
	@echo "               bench/results/; BENCH_ARGS='--only 1024 --optimizers Shampoo --sections steps' chooses"
	@echo "make gpu-bench the same on a machine with a GPU, in \$$(PYTHON)'s own environment"
	@echo "make bench-pytest  benchmarks that hold steps to a reference operation, by pytest-benchmark"
	@echo "make profile   where the time of a step goes on this machine's CPU, by phase: a table and a trace in runs/profile/;"
	@echo "               PROFILE_ARGS='--optimizer RFRMSProp --frequency 10' chooses"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove $(VENV), builds and caches"
	@echo
	@echo "All but gpu*, fake-gpu and clean run install first where it is due. PYTHON=python3.12 chooses the interpreter,"
	@echo "ROOTFREE_BUILD=none|cpu|cuda what is compiled (make clean before a change of either)."

install: $(STAMP)

test: $(STAMP)
	@$(VPY) -m pytest $(PYTEST_ARGS)

kernels: $(STAMP) $(OLDEST)/.installed
	@$(VPY) -m bench.gate.triton $(KERNEL_ARGS)
	@PYTHONPATH="$(OLDEST)$${PYTHONPATH:+:$$PYTHONPATH}" $(VPY) -m bench.gate.triton $(KERNEL_ARGS)
	@$(VPY) -m bench.gate.cuda $(KERNEL_ARGS)

sanitize: $(STAMP)
	@.ci/sanitize

# No .venv here: PYTHON is the one that has PyTorch and Triton for the GPU, and nothing is fetched.
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

lint: $(STAMP)
	@$(VPY) -m ruff check .
	@$(VPY) -m ruff format --check .
	@trap 'rm -f rootfree_kernels/triton_kernels' EXIT; ln -sfn ../triton_kernels rootfree_kernels/triton_kernels; \
	  $(VPY) -m mypy rootfree_kernels  # which has to see the folder where it is imported from

clean:
	rm -rf $(VENV) $(GPU_VENV) .gpu-bundle build dist *.egg-info rootfree_kernels/_C.*so rootfree_kernels/_build*.json
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench csrc rootfree_kernels tests triton_kernels -name __pycache__ -prune -exec rm -rf {} +

# PyTorch comes before the package: the extension is compiled against the very version that will run it.
$(STAMP): $(BUILD_INPUTS) | $(VPY)
	@echo "installing the pinned dependencies and rootfree-kernels (again only when they change) ..."
	@$(PIP) install -c constraints.txt torch setuptools wheel pybind11 ninja
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[dev,bench]'
	@$(VPY) -m rootfree_kernels
	@touch $@

$(GPU_STAMP): $(BUILD_INPUTS) bench/gpu_run/requirements.txt | $(GPU_VENV)/bin/python
	@echo "installing PyTorch $(GPU_TORCH) for CUDA and rootfree-kernels (again only when they change) ..."
	@$(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install torch==$(GPU_TORCH) triton==$(GPU_TRITON) \
	  -r bench/gpu_run/requirements.txt
	@ROOTFREE_BUILD=cuda $(GPU_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation \
	  --no-deps -e .
	@touch $@

$(GPU_VENV)/bin/python:
	@$(GPU_PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: there is no working $(GPU_PYTHON); name the GPU machine's Python: make GPU_PYTHON=python3.12"; exit 1; }
	@$(GPU_PYTHON) -m venv $(GPU_VENV)

# Beside the pinned Triton and not in its place: who puts this folder on PYTHONPATH imports the older one.
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
