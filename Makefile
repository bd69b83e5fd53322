# Two commands matter: `make demo` and `make test`.  TORCH=… overrides the torch that is installed first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test fast lint bench docs soak wheel clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q -e ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## adapt the shipped base with six methods and write demo-output/report.html
	$(PY) -m rankwise.cli.main demo --out demo-output

test: $(VENV)/.installed  ## every test of one change (under 9 minutes on two cores); neighbours share a process, so that what a file sets up is set up once
	$(PY) -m pytest -n 2 --dist worksteal -m "not soak"

fast: $(VENV)/.installed  ## the same without what takes more than ten seconds a test
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not soak"

lint: $(VENV)/.installed  ## style, floors, types, workflows
	$(VENV)/bin/ruff check src tests benchmarks examples
	$(VENV)/bin/ruff format --check src tests benchmarks examples
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(VENV)/bin/pre-commit validate-config

bench: $(VENV)/.installed  ## measure beside PEFT; results in benchmarks/results, table in docs/performance.md
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.many_adapters
	$(PY) -m benchmarks.inits
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.import_time
	$(PY) -m benchmarks.serving_ops
	$(PY) -m benchmarks.serving_policies
	$(PY) -m benchmarks.table

docs: $(VENV)/.installed  ## the table of all methods, docs/methods/README.md
	$(PY) -m rankwise.cli.main methods --markdown > docs/methods/README.md

soak: $(VENV)/.installed  ## the long counts
	$(PY) -m pytest -m soak --timeout 7200

wheel: $(VENV)/.installed  ## dist/*.whl by way of the source archive, so that what one lacks the other lacks
	$(PY) -m build --no-isolation

clean:
	rm -rf $(VENV) demo-output dist .pytest_cache .ruff_cache .mypy_cache
