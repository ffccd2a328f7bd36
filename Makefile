# Two commands do everything on a fresh machine: `make train`, `make test`. Both build .venv first.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Stamps: the runtime dependencies are installed, and those of development too. They hold the place of the clone.
RUNTIME := $(VENV)/.runtime
INSTALLED := $(VENV)/.installed
# The installer: uv where there is one, pip otherwise or with UV= (empty).
UV ?= $(shell command -v uv 2>/dev/null)
WORKERS ?= 2
# Workers whose threads fight for the cores take most of the time. Files, not tests, are shared out: they have fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help train test test-slow test-all test-oldest test-faults fuzz check docs bench results-gpu results-cpu clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# A clone that was moved is installed again: what .venv holds names the old place.
ifneq "$(shell cat $(RUNTIME) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(RUNTIME)
endif
ifneq "$(shell cat $(INSTALLED) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(INSTALLED)
endif

# $(call install,folder,what)
define install
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"consistency needs Python 3.10 to 3.13, {sys.executable} is {v[0]}.{v[1]}; use make PYTHON=/path/to/python3")'
@mkdir -p $(1) 2>/dev/null && test -w $(1) || { echo "$(1) cannot be written here; use make VENV=/path/to/a/folder that can" >&2; exit 1; }
@echo "Installing into $(1) (torch is large: a minute or two the first time) ..."
@if [ -n "$(UV)" ]; then \
	test -x $(1)/bin/python || "$(UV)" venv -q --allow-existing -p "$$(command -v $(PYTHON))" $(1); \
	"$(UV)" pip install -q -p $(1)/bin/python $(2); \
else \
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1); \
	$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip >/dev/null; \
	$(1)/bin/python -m pip install -q --disable-pip-version-check $(2); \
fi
endef

$(RUNTIME): pyproject.toml
	$(call install,$(VENV),-e .)
	@echo "$(CURDIR)" > $@

$(INSTALLED): pyproject.toml
	$(call install,$(VENV),-e '.[dev]')
	@echo "$(CURDIR)" | tee $(RUNTIME) > $@

train: $(RUNTIME)  ## Train iCT on real digits: about 4 minutes on 2 cores, writes outputs/digits_ict/
	@$(BIN)/consistency-train experiment=digits_ict $(ARGS)

test: $(INSTALLED)  ## Test the installation: some minutes on 2 cores (ARGS='-k samplers' for a part)
	@$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(INSTALLED)  ## The rest: kills, multiruns, several processes, the compiler, the browser, packaging, fuzzing
	@$(PYTEST) -m slow $(ARGS)

test-all: $(INSTALLED)  ## Both
	@$(PYTEST) $(ARGS)

test-oldest:  ## The tests of `make test` with the lowest versions that pyproject.toml allows, in .venv-oldest
	@mkdir -p .venv-oldest && $(PYTHON) tests/oldest.py > .venv-oldest/constraints.txt
	$(call install,.venv-oldest,-e '.[dev]' -c .venv-oldest/constraints.txt)
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow' $(ARGS)

test-faults: $(INSTALLED)  ## Kill the digits recipe 50 times at random moments: it must end with the same bits; half an hour
	@$(BIN)/python tests/faults.py $(ARGS)

fuzz: $(INSTALLED)  ## Feed damaged files to every reader: 11,600 inputs, about 8 minutes on 2 cores
	@FUZZ_INPUTS=$${FUZZ_INPUTS:-400} $(PYTEST) tests/fuzz $(ARGS)

check: $(INSTALLED)  ## Lint, format, spelling, types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m codespell_lib
	@$(BIN)/python -m mypy

docs: $(INSTALLED)  ## Measure the digits runs under outputs/ for the table of experiments/README.md
	@$(BIN)/python experiments/measure_digits.py $(ARGS)

bench: $(INSTALLED)  ## Where the time goes, beside diffusers; under 5 minutes (ARGS='--device cuda experiment=photos_ict speed=gpu')
	@$(BIN)/python experiments/bench $(ARGS)

results-gpu: $(INSTALLED)  ## Train the five methods on photographs 32x32 and write the results table (ARGS='--data cifar10')
	@$(BIN)/python experiments/measure_photographs.py gpu $(ARGS)

results-cpu: $(INSTALLED)  ## The same with 16x16 images and a tiny network, without a GPU
	@$(BIN)/python experiments/measure_photographs.py cpu $(ARGS)

clean:  ## Remove .venv, .venv-oldest and caches; outputs/ stays
	rm -rf $(VENV) .venv-oldest .mypy_cache .ruff_cache .pytest_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
