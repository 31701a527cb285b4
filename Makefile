# Two commands on a fresh machine with Python >= 3.11 and make: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-all lint catalogue clean

run: $(VENV)/ready-to-run          ## the main job on real data: handwritten digits
	$(BIN)/fieldguide fit digits

test: $(VENV)/ready-to-test        ## everything that is quick: under 12 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(VENV)/ready-to-test    ## the slow checks too
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/ready-to-test
	$(BIN)/ruff check src tests benchmarks docs

catalogue: $(VENV)/ready-to-run    ## docs/catalogue.md from the cards
	$(BIN)/python docs/catalogue.py

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
