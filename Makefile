# Two commands matter: `make lab` to read and run the book, `make test` to check all of it. `make help` lists the rest.
PYTHON ?= python3
NB ?=
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
# The stamp carries the interpreter's name: another PYTHON makes another environment. It is older than the files that define the
# environment exactly when those have changed since it was installed.
STAMP := $(VENV)/installed-$(notdir $(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help install lab test quick elsewhere docs run rerun draft export lint clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(STAMP) ## make .venv with the pinned environment (the others do this by themselves)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmbook needs Python 3.11 or newer; name one: PYTHON=python3.12 make lab")'
	@echo "Installing the book's environment into $(VENV) (once; a few minutes)"
	@test -e $(STAMP) || rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[compiled]' 2>/dev/null || echo "(kenlm and knlm could not be compiled, for want of a C++ compiler or of Python's headers: comparisons with them will be skipped)"
	@touch $(STAMP)

lab: $(STAMP) ## open JupyterLab on the first chapter (LAB_IP, LAB_PORT: where it listens)
	$(PY) -m tools.lab

test: $(STAMP) lint docs ## re-run and compare every cell, test the package, the claims and the site
	$(PY) -m tools.notebooks check
	$(PY) -m pytest -p tools.quick -n $(JOBS) --dist loadfile --nbval --nbval-current-env nbs tests
	$(PY) -m tools.elsewhere --part --jobs $(JOBS)

quick: $(STAMP) lint ## only the notebooks and tests that a change touches (ALL=1: all; LIST=1: say which; NB=: of these only)
	$(PY) -m tools.notebooks check
	$(PY) -m tools.quick --jobs $(JOBS)$(if $(ALL), --all)$(if $(LIST), --list) $(NB)

elsewhere: $(STAMP) ## re-run all notebooks as other processors would compute them (an hour; make test runs a part)
	$(PY) -m tools.elsewhere --jobs $(JOBS) $(NB)

docs: $(STAMP) ## render the site into docs/_build/html (warnings are errors)
	$(PY) -m docs.build

run: export ## execute a notebook, store its outputs and how far they move: make run NB=nbs/10_corpora.ipynb (default: all)
	$(PY) -m tools.notebooks run --jobs $(JOBS) $(NB)

rerun: export ## the same after cells were moved or renamed: keeps what was stored and measured where it still holds
	$(PY) -m tools.notebooks run --kept $(or $(SINCE),HEAD) --jobs $(JOBS) $(NB)

draft: export ## the same, once and without measuring: for the time of writing
	$(PY) -m tools.notebooks run --draft --jobs $(JOBS) $(NB)

export: $(STAMP) ## write lmbook/ from the notebooks
	$(PY) -m tools.notebooks export

lint: $(STAMP) ## ruff over notebooks, package, tests and tools; mypy over the package; the book's words, sentences and links
	$(PY) -m ruff check nbs lmbook tests tools docs benchmarks
	$(PY) -m mypy
	$(PY) -m tools.prose

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) docs/_build docs/node_modules build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .quick.json
