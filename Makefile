# Two commands set everything up on a fresh machine: `make demo` trains and compares four models, `make test` tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint bench install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train ARM, MDM, Prime and Prime-v2 on real text and compare their valid bounds (about 20 minutes)"
	@echo "make test    all tests but the slow ones;  make test-slow  the slow ones (faults at random moments)"
	@echo "make lint    ruff and pyright;             make bench      every benchmark, with ratios"

# Set-up: one environment, versions from constraints.txt. The exact torch version keeps CUDA builds off machines
# without a GPU; on a GPU machine see docs/install.md.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/unmask data fetch prose-21
	$(BIN)/python -m llm.demo

test: install
	$(BIN)/unmask data fetch prose-21 tokenizers
	UNMASK_REQUIRE_DATA=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: install
	UNMASK_REQUIRE_DATA=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/unmask data fetch prose-21
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
