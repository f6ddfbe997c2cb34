# demo | test | check | test-all | docs | bench : each sets up what it needs in .venv by itself; CI calls the same words.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

demo: $(READY)
	$(BIN)/medlore demo --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not full and not weights"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not weights"

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks maintenance
	$(BIN)/ruff check src tests benchmarks maintenance
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src/medlore maintenance
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(READY)
	$(BIN)/python -m benchmarks

# torch is named on the same line with its tested version, so that pip does not choose another build for it
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt) -e '.[dev]'
	touch $(READY)

.PHONY: demo test test-all check docs bench
