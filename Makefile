# make demo: train a small captioner from scratch. make test: run everything that CI checks. make conformance: run the
# common tests of transformers on captioners.

VENV := .venv
PYTHON := python3
EXTRAS := test
BIN := $(VENV)/bin
# transformers==5.23.0, of which the source archive holds the common tests
TRANSFORMERS := $(shell grep ^transformers== constraints.txt)
SOURCE := build/$(subst ==,-,$(TRANSFORMERS))

.PHONY: demo test lint format conformance

demo: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python train_hf.py

# One process for each core, each with one thread. The tests of a file stay together, because they share trained models.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile --no-loadscope-reorder

conformance: $(VENV)/installed-$(EXTRAS) $(SOURCE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --override-ini verbosity_subtests=0 tests/conformance

$(SOURCE): | $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest build '$(TRANSFORMERS)'
	tar --extract --file $@.tar.gz --directory build

lint: $(VENV)/installed-$(EXTRAS) build/types/qformer_captioner
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The repository root is the package, but a clone may have any name, so the type checker uses this link.
build/types/qformer_captioner:
	mkdir -p $(@D)
	ln -s ../.. $@

$(VENV)/installed-$(EXTRAS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
