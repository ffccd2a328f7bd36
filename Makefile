# Two commands do everything on a fresh machine: `make train`, `make test`. Both build .venv first.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help train test test-faults fuzz check docs bench results-gpu results-cpu clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"consistency needs Python 3.10 to 3.13, {sys.executable} is {v[0]}.{v[1]}; use make PYTHON=/path/to/python3")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large: a minute or two the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

train: $(INSTALLED)  ## Train iCT on real digits: about 4 minutes on 2 cores, writes outputs/digits_ict/
	@$(BIN)/consistency-train experiment=digits_ict $(ARGS)

test: $(INSTALLED)  ## Run the whole test suite (ARGS='-k samplers' for a part)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: $(INSTALLED)  ## Kill the digits recipe 50 times at random moments: it must end with the same bits; half an hour
	@$(BIN)/python tests/faults.py $(ARGS)

fuzz: $(INSTALLED)  ## Feed damaged files to every reader: 11,600 inputs, about 8 minutes on 2 cores
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-400} $(BIN)/python -m pytest -n 2 tests/fuzz $(ARGS)

check: $(INSTALLED)  ## Lint, format, spelling, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

docs: $(INSTALLED)  ## Measure the digits runs under outputs/ for the table of experiments/README.md
	@$(BIN)/python experiments/measure_digits.py $(ARGS)

bench: $(INSTALLED)  ## Where the time goes, beside diffusers; under 5 minutes (ARGS='--device cuda experiment=photos_ict speed=gpu')
	@$(BIN)/python experiments/bench $(ARGS)

results-gpu: $(INSTALLED)  ## Train the five methods on photographs 32x32 and write the results table (ARGS='--data cifar10')
	@$(BIN)/python experiments/measure_photographs.py gpu $(ARGS)

results-cpu: $(INSTALLED)  ## The same with 16x16 images and a tiny network, without a GPU
	@$(BIN)/python experiments/measure_photographs.py cpu $(ARGS)

clean:  ## Remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
