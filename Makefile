# `make quickstart` and `make test` do all set-up themselves; PY=python3.12 picks another interpreter.
PY ?= python3
VERSION := $(shell $(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PY) does not run; name a Python of version 3.11 or newer, as in `make test PY=python3.12`)
endif
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
COMPILER := $(VENV)/.compiler
DOCS := $(VENV)/.docs

.PHONY: quickstart test test-slow lint format docs wheel clean

$(READY): pyproject.toml
	$(PY) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	$(RUN) -m pip install --quiet --no-deps mistral-common  # only for its SentencePiece model, which a test reads
	touch $@

# Apart, since with libtpu installed every program that finds no TPU says so.
$(COMPILER): $(READY)
	$(RUN) -m pip install --quiet --editable '.[dev,compile]'
	touch $@

$(DOCS): $(READY)
	$(RUN) -m pip install --quiet --editable '.[dev,docs]'
	touch $@

quickstart: $(READY)
	$(RUN) -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(COMPILER) lint
	$(RUN) -m pytest -n 2 --dist loadfile -m 'not slow'

test-slow: $(COMPILER)
	$(RUN) -m pytest -m slow

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: $(READY)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

docs: $(DOCS)
	$(RUN) -m properdocs build --strict

wheel: $(READY)
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv-* build dist site *.egg-info .pytest_cache .ruff_cache
