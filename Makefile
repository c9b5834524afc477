# make demo    set up, then run the demo: stock vLLM against armed vLLM on a real model
# make test    set up and run all tests: unit tests, those that start the real engine, the Ascend checks. Two parts run at
#              once, set-up among them, and each part's output is printed whole when the part is done
# make test-gpu    the tests that need a CUDA GPU; sets nothing up: PYTHON has vLLM for CUDA, wrapt and pytest already,
#                  e.g. make test-gpu PYTHON=/path/to/venv/bin/python
# make test-ascend    the Ascend checks alone, no NPU needed: real torch_npu over stub CANN libraries, kernels down to HIVM
# make docs    the documentation site into build/site, links checked; sets up .venv-docs from pinned versions, seconds once
# make lint    style of the code, and the arrows between its layers (pyproject.toml, import-linter)
# Set-up makes .venv from pinned versions once; later runs reuse it.

PYTHON ?= python3
VENV ?= .venv
ASCEND ?= .venv-ascend
DOCS ?= .venv-docs
# An index with CPU builds of torch, e.g. PyTorch's own; empty where the default index serves them.
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES := $(shell find bi_patch kernels patches bi_patch_entry.py bi_patch_pytest.py bi_patch_autoload.pth pyproject.toml -type f -not -name '*.pyc' 2>/dev/null)

# No model hub and no usage reports; two threads at least, since one hides variance.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

# $(call install,PYTHON,FILE): install the packages of a list. Four pips share the list, since each waits for the network.
# Python makes bytecode of what is imported, a third of all, at the first import.
install = awk '!/^\#/ {part[NR % 4] = part[NR % 4] " " $$1} END {for (i in part) print part[i]}' $(2) | \
	xargs -P 4 -L 1 $(1) -m pip --disable-pip-version-check install --quiet --quiet --no-deps --no-compile $(INDEX)

.PHONY: demo test test-engine test-processes test-unit test-kernels test-tables test-alone test-fast test-all test-gpu \
	test-ascend bench check lint docs setup clean

# Tests of `make test`: without the slow ones, and without those that measure time, which run alone.
HERE := not slow and not gpu and not ascend
BESIDE := $(HERE) and not alone

setup: $(VENV)/.installed

demo: setup
	$(BIN)/bi-patch demo

test:
	@echo "Two lanes run at once: set-up (minutes the first time) and the parts of the tests. Each part prints its output"
	@echo "when it is done, after minutes"
	$(MAKE) -k -j2 --output-sync=target $(PARTS)
	$(MAKE) test-alone

# In this order: while one lane sets up $(VENV), the other sets up $(ASCEND) and runs its part. Then the longest parts
# begin first, so that both lanes end at about the same time.
PARTS := lint test-engine test-ascend test-kernels test-processes test-unit test-tables docs

# Waiting threads sleep, for other tests run beside them.
test-engine test-processes test-ascend test-unit test-kernels: export OMP_WAIT_POLICY := passive

# $(call within,MINUTES,COMMAND): a part that hangs is interrupted, and pytest then says where, so that the other parts
# still run and report.
within = timeout --foreground --signal=INT --kill-after=60 $(1)m $(2) || { code=$$?; case $$code in 124|137) \
	echo "$@: not done after $(1) minutes, so it was ended: a test hangs, or the machine is many times slower than usual. Engines of it may run on" >&2;; \
	esac; exit $$code; }

# Files whose tests start processes of their own (servers, ranks, trainers, the demo): a third part, since the engine's
# tests take longer than all others together.
PROCESSES := $(patsubst %,tests/engine/test_%.py,demo import parity pooling_server ranks server training two_engines weights)

test-engine: setup
	$(call within,50,$(BIN)/pytest --durations=20 -m "engine and $(BESIDE)" $(PROCESSES:%=--ignore=%) tests)

test-processes: setup
	$(call within,40,$(BIN)/pytest --durations=20 -m "engine and $(BESIDE)" $(PROCESSES))

test-unit: setup
	$(call within,30,$(BIN)/pytest --durations=20 -m "not engine and $(BESIDE)" --ignore=tests/unit/kernels tests)

test-kernels: setup
	$(call within,30,$(BIN)/pytest --durations=20 -m "not engine and $(BESIDE)" tests/unit/kernels)

test-tables: setup
	$(call within,10,$(BIN)/bi-patch check --all)
	$(call within,10,$(BIN)/bi-patch bench --tables --check)
	$(call within,10,$(BIN)/bi-patch features README.md docs/coverage.md)

test-alone: setup
	$(call within,15,$(BIN)/pytest -m "alone and $(HERE)" tests)

test-fast: setup
	$(call within,60,$(BIN)/pytest -m "not engine and $(HERE)" tests)

test-all: setup test-ascend
	$(PIP) install --quiet --no-deps $(INDEX) -r requirements/images.txt
	BI_PATCH=0 $(BIN)/python requirements/images.py
	$(call within,360,$(BIN)/pytest -m "not gpu and not ascend" tests)
	$(call within,120,$(call ascend,ascend and slow))

test-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	echo "test-gpu needs a CUDA GPU and a torch that sees it; $(PYTHON) has none" >&2; exit 1; }
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu

# $(call ascend,MARKS): the Ascend checks that have these marks.
ascend = env PYTHONPATH=. BI_PATCH=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	$(ASCEND)/bin/python -m pytest --durations=20 -m "$(1)" tests/ascend

test-ascend: $(ASCEND)/.installed
	$(call within,40,$(call ascend,ascend and not slow))

bench: setup
	$(BIN)/bi-patch bench

check: setup
	$(BIN)/bi-patch check --all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

docs: $(DOCS)/.installed
	$(call within,10,env NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --clean)

clean:
	rm -rf $(VENV) $(ASCEND) $(DOCS) build dist

$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/docs.txt
	touch $@

$(VENV)/.requirements: requirements/cpu.txt
	@echo "Setting up $(VENV): the real vLLM engine for CPU, about 3 GB, a few minutes once"
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed, found " + sys.version'
	$(PYTHON) -m venv --clear $(VENV)
	$(call install,$(BIN)/python,requirements/cpu.txt)
	touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(PIP) install --quiet --no-deps --no-build-isolation --force-reinstall .
	touch $@

$(ASCEND)/.installed: requirements/ascend.txt tests/ascend/stub_cann.py tests/ascend/stub_cann.c tests/ascend/sources.py
	@echo "Setting up $(ASCEND): torch_npu, triton-ascend, AscendNPU-IR, sources of vLLM 0.23; about 3 GB, minutes once"
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed, found " + sys.version'
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "The Ascend checks need Linux on x86_64 (wheels of torch_npu, \
	triton-ascend and ascendnpu-ir); this is $$(uname -sm)" >&2; exit 1; }
	@for tool in cc nm git; do command -v $$tool > /dev/null || { \
	echo "The Ascend checks need $$tool on PATH: it builds the stub CANN libraries, or applies patches" >&2; exit 1; }; done
	$(PYTHON) -m venv --clear $(ASCEND)
	@$(call install,$(ASCEND)/bin/python,requirements/ascend.txt) || { \
	echo "A package of requirements/ascend.txt cannot be had: pip names it above. Give an index that has it" \
	"(PIP_INDEX_URL; TORCH_INDEX=https://download.pytorch.org/whl/cpu for torch)" >&2; exit 1; }
	@PYTHONPATH=. BI_PATCH=0 $(ASCEND)/bin/python tests/ascend/sources.py $(ASCEND)/sources || { \
	echo "The releases vllm 0.23.0 and vllm-ascend 0.23.0 cannot be had from the package index" >&2; exit 1; }
	$(ASCEND)/bin/python tests/ascend/stub_cann.py $(ASCEND)/stub-cann
	touch $@
