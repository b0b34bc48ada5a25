# Every target sets up what it needs. PY=python3.12 picks another interpreter.
PY ?= python3
VERSION := $(shell $(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PY) does not run; name a Python of version 3.11 or newer, as in `make test PY=python3.12`)
endif
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
# libtpu has an environment on top of the other one: where it is installed, every program warns that it finds no TPU.
LIBTPU_VENV := $(VENV)-libtpu
LIBTPU_RUN := $(LIBTPU_VENV)/bin/python
LIBTPU := $(LIBTPU_VENV)/.ready
# So has the CUDA plugin, for the same reason.
CUDA_VENV := $(VENV)-cuda
CUDA_RUN := $(CUDA_VENV)/bin/python
CUDA := $(CUDA_VENV)/.ready
# An environment that has all packages of $(VENV) and those that are installed on top.
define overlay
	@$(PY) -m venv --without-pip $(1)
	@$(RUN) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	    > $(1)/lib/python$(VERSION)/site-packages/base.pth
	@$(RUN) -m pip --python $(1)/bin/python install --quiet --no-compile 'idattn[$(2)]'  # the one in $(VENV)
	@touch $(1)/.ready
endef

# Modules are compiled as they are imported: most of those that pip would compile never are. Where the environment tells
# Python to store none of it, every program would compile all that it imports anew, three times the time of the import.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(RUN) -m pip install --quiet --no-compile

.PHONY: help quickstart test test-quick test-libtpu test-slow test-gpu-compile lint style types format docs notebooks \
    wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(CORE)  ## train a small language model on a CPU
	$(RUN) -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

# Processes of the tests wait for one another; types and the TPU's compiler fill those gaps, and say at their end what
# they have found.
test: style  ## lint, and run all tests but the slow ones
	@$(MAKE) --no-print-directory --jobs=3 test-quick test-libtpu types

test-quick: $(DEV)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow and not libtpu and not gpu_compile'

test-libtpu: $(LIBTPU)
	@said=$$($(LIBTPU_RUN) -m pytest -m 'not slow and libtpu' 2>&1); code=$$?; \
	    printf '\nTests with libtpu:\n%s\n' "$$said"; exit $$code

test-slow: $(LIBTPU)  ## run the tests that take minutes each
	$(RUN) -m pytest -m 'slow and not libtpu and not gpu_compile'
	$(LIBTPU_RUN) -m pytest -m 'slow and libtpu'

test-gpu-compile: $(CUDA)  ## run the tests that compile for GPUs, without one
	$(CUDA_RUN) -m pytest -m gpu_compile

lint: style types  ## check style, format and types

style: $(DEV)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

types: $(DEV)  ## check types
	@said=$$($(RUN) -m pyright --pythonpath $(RUN) 2>&1); code=$$?; printf '\nTypes: %s\n' "$$said"; exit $$code

format: $(DEV)  ## apply style and format
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(DOCS)  ## build the site below site/
	$(RUN) -m properdocs build --strict

notebooks: $(LIBTPU)  ## run the notebooks and store their outputs
	$(RUN) notebooks/execute.py notebooks/0[123]_*.ipynb
	$(LIBTPU_RUN) notebooks/execute.py notebooks/04_pod.ipynb

wheel: $(CORE)  ## build the wheel below dist/
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## delete environments, builds and caches
	rm -rf .venv-* build dist site *.egg-info .pytest_cache .ruff_cache

$(CORE): pyproject.toml
	@echo 'Setting up $(VENV): the packages that idattn runs with (about 800 MB)'
	@$(PY) -m venv $(VENV)
	@$(INSTALL) --editable .
	@touch $@

$(DEV): $(CORE)
	@echo 'Adding the tools and packages of the tests to $(VENV) (about 900 MB)'
	@$(INSTALL) --editable '.[dev,types]'
	@$(INSTALL) --no-deps mistral-common  # only for its SentencePiece model, which a test reads
	@touch $@

$(DOCS): $(CORE)
	@echo 'Adding what builds the pages to $(VENV)'
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(LIBTPU): $(DEV)
	@echo "Setting up $(LIBTPU_VENV): the TPU's compiler (about 700 MB)"
	$(call overlay,$(LIBTPU_VENV),compile)

$(CUDA): $(DEV)
	@echo "Setting up $(CUDA_VENV): the compiler for GPUs (about 5 GB)"
	$(call overlay,$(CUDA_VENV),compile-gpu)
