# The commands of the README. Everything goes into .venv of this checkout; PYTHON, VENV and RUN can be overridden.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN ?= quickstart-$(shell date +%Y%m%d-%H%M%S)
RANKS ?= 2
PYTEST := $(BIN)/python -m pytest -q
# A file's tests stay on one worker: their fixtures are shared. Scheduler tests are not split, they share one Slurm.
WORKERS ?= 2
EVERY_CHANGE := not slow and not network and not slurm

.PHONY: help install validators quickstart test test-all lint types slurm-tests browser-tests recipes-short kernels-targets docs

help:
	@echo "make quickstart       install, fetch, fine-tune SmolLM2-135M on medical terms with two ranks, show before/after"
	@echo "make test             lint, types and the tests of every change"
	@echo "make slurm-tests      generated scripts on a real Slurm on this host (Debian packages: see docs/launching.md)"
	@echo "make browser-tests    the report and the studio in headless Chromium (Debian: chromium, nodejs, npm), axe-core included"
	@echo "make recipes-short    two recipes of other sectors trained for some minutes each and judged on held-out rows"
	@echo "make kernels-targets  compile a subset of the kernels for every GPU target, without a GPU"
	@echo "make test-all         everything, also what takes long or asks a package registry"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-train: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[deepspeed,mpi,test]'
	@touch $@ $(VENV)/.installed-train

install: $(VENV)/.installed-train

quickstart: export OMP_NUM_THREADS ?= 1
quickstart: $(VENV)/.installed-train
	$(BIN)/aifactory fetch health/phenotype-terms
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m aifactory_train train health/phenotype-terms --name $(RUN)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@twice=$$(find tests -name 'test_*.py' -exec basename {} \; | sort | uniq -d); \
	  [ -z "$$twice" ] || { echo "two test modules are called $$twice: pytest wants names of their own" >&2; exit 1; }
	$(BIN)/aifactory sites check
	$(PYTEST) tests/lint

types: $(VENV)/.installed-test
	$(BIN)/mypy aifactory_train

# The official validators of two formats of the evidence pack want older libraries than ours: an environment of their own.
.validators/bin/python:
	$(PYTHON) -m venv .validators
	.validators/bin/python -m pip --disable-pip-version-check install -q mlcroissant==1.1.1 roc-validator==0.13.0 rocrate==0.16.0

validators: .validators/bin/python

test: lint types
	$(PYTEST) -n $(WORKERS) --dist loadfile --durations 15 -m "$(EVERY_CHANGE)"

# The pages of docs/ as a site in site/, which needs no server; a link that leads nowhere is a fault.
docs: $(VENV)/.installed-test
	$(BIN)/mkdocs build --strict --quiet

slurm-tests: $(VENV)/.installed-test
	AIFACTORY_REQUIRE_SLURM=1 $(PYTEST) -m "slurm and not slow"

browser-tests: $(VENV)/.installed-test
	npm install --ignore-scripts --no-audit --no-fund --silent --prefix tests/record
	AIFACTORY_REQUIRE_BROWSER=1 $(PYTEST) -m "" tests/record/test_report.py tests/studio -k chromium

# Held-out figures of two sectors; all recipes: python benchmarks/recipes.py --write
recipes-short: $(VENV)/.installed-train
	$(BIN)/python benchmarks/recipes.py --only cybersecurity/attack-tactic --only code/docstrings --json

kernels-targets: $(VENV)/.installed-test
	$(BIN)/aifactory kernels check --subset

test-all: lint types
	AIFACTORY_FUZZ=1 $(PYTEST)
