# On a fresh machine with Python >= 3.11 and make: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CODE := src tests benchmarks docs tools

.PHONY: run test quick test-all lint format catalogue fuzz plan-errors new-model clean

run: $(VENV)/ready-to-run          ## train on real data: handwritten digits
	$(BIN)/fieldguide fit digits

test: $(VENV)/ready-to-test        ## style, types and quick tests, at the same time: about 12 minutes on 2 cores
	$(MAKE) --no-print-directory --jobs=2 lint quick

quick: $(VENV)/ready-to-test       ## the quick tests alone
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint                     ## the slow tests too
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/ready-to-test        ## style and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/ready-to-test
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

catalogue: $(VENV)/ready-to-run    ## docs/catalogue.md, docs/checkpoints.md and the index of the command line
	$(BIN)/python docs/catalogue.py
	$(BIN)/python docs/checkpoints.py

fuzz: $(VENV)/ready-to-test          ## mutate a valid file of every format that is read
	$(BIN)/python tools/fuzz.py

plan-errors: $(VENV)/ready-to-run  ## measure the errors of `fieldguide plan` on an idle machine (hours); ARGS=--all for all anew
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan_errors.py $(ARGS)

new-model: $(VENV)/ready-to-run    ## make new-model NAME=my-net FAMILY=convolutional
	$(BIN)/python tools/new_model.py $(NAME) $(FAMILY)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready-to-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/ready-to-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev,peers,track]'
	touch $@ $(VENV)/ready-to-run

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
