# `make demo` and `make test` are all a newcomer needs: each sets up .venv first when it is missing or out of date.

PYTHON ?= python3
EXTRAS ?= dev,train,demo,batch,ray,serve
SUBPACKAGES := accelerators pipelines kernels app benchmarks

BIN := .venv/bin
STAMP := .venv/.hasten-setup
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
CAPTIONS := "a small red circle" \
	"a large blue square above a small yellow triangle" \
	"a green cross left of a purple circle" \
	"a large cyan square right of a small red triangle" \
	"a small blue circle below a large green cross and left of a yellow square"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format types bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | awk -F': *' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## create or refresh .venv

# torch goes first and with its exact version: where a CPU build is at hand it is taken, and nothing later replaces it by a
# newer one that brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else f"hasten needs Python 3.10 or newer, this is {sys.version}")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## draw pictures from captions, plain and accelerated side by side, into demo-out/
	HF_HUB_OFFLINE=1 $(BIN)/hasten generate $(CAPTIONS) --compare --out demo-out

test: $(STAMP)  ## run the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow"

test-all: $(STAMP)  ## run every test, those that install packages or take minutes too
	HF_HUB_OFFLINE=1 HASTEN_EXAMPLES=$${HASTEN_EXAMPLES:-50} $(BIN)/python -m pytest -q

# No static tool knows of the __path__ line in src/hasten/__init__.py, by which a checkout finds its sub-packages. So mypy is
# shown a folder of links in which `hasten` looks as it does when installed.
types:
	@rm -rf build/types && mkdir -p build/types/hasten
	@ln -s "$(CURDIR)"/src/hasten/* build/types/hasten/
	@for name in $(SUBPACKAGES); do if [ -d $$name ]; then ln -s "$(CURDIR)/$$name" build/types/hasten/$$name; fi; done

lint: $(STAMP) types  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy -p hasten

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## run the benchmarks, quick settings
	HF_HUB_OFFLINE=1 $(BIN)/hasten bench caching --quick

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist demo-out *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
