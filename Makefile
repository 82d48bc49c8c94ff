# `make reproduce` finds the circuits of the pair that ships and writes a report; `make test` runs
# the tests. Both set up .venv first and need nothing but Python (3.10 or later) and make.

PYTHON ?= python3
VENV ?= .venv
OUT ?= results
BIN := $(VENV)/bin

.PHONY: reproduce test lint setup setup-dev train-default-pair clean

reproduce: setup
	$(BIN)/tl-entity reproduce --out $(OUT)

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

train-default-pair: setup
	$(BIN)/tl-entity train-default-pair --out $(OUT)/default_pair

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# torch first and by itself: given with the rest, its pin would not keep other indexes' builds out.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tl_entity needs Python 3.10 or later; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
