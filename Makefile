# The commands of the README. Everything goes into .venv of this checkout; PYTHON, VENV and EXTRAS can be overridden.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= train
BIN := $(VENV)/bin
STAMP = $(VENV)/.installed-$(1)

.PHONY: help quickstart test test-all lint types clean

help:
	@echo "make quickstart   install, fetch, fine-tune SmolLM2-135M on medical terms with two ranks, show before/after"
	@echo "make test         lint, types and the tests of every change (under 15 minutes on two cores)"
	@echo "make test-all     also the slow, registry and scheduler tests"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[deepspeed,mpi,test]'
	@touch $@ $(VENV)/.installed-train
