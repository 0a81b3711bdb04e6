# Every target creates the virtual environment that it needs and installs into it; nothing is done by hand.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-newest test-peers newest sanitize fuzz lint clean

INSTALL_INPUTS := pyproject.toml CMakeLists.txt $(filter-out %.md,$(wildcard cuda_ffi/csrc/*/*.*)) \
	$(wildcard cuda_ffi/csrc/xla/ffi/api/*.h)
# A test spends most of its time in XLA's compiler, often on programs that other files compile too. So a file stays on
# one worker, and the workers share a cache that exists for this run only (an older one might be for another processor).
# Bytecode goes there too: if Python may not write any, each process compiles jax's modules again, in seven seconds.
# LLVM's lowest optimisation level compiles a program in two thirds of the time. In jax 0.10.2, the last for Python
# 3.11, the emitters without MLIR take two thirds of that; the second run uses the emitters that users have. XLA_FLAGS
# from the environment takes precedence. LLVM compiles a program as one part, because the other core has work of its own.
# The files that take longest begin first (tests/conftest.py), where xdist would begin with those of most tests.
# Programs don't say which lines of Python they come from, which takes a tenth of the time to write and to read.
XLA = --xla_backend_optimization_level=0 $$($(1) -c 'import sys; print("--xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1" * (sys.version_info < (3, 12)))')
PYTEST = cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && JAX_PLATFORMS=cpu XLA_FLAGS="$(XLA) $$XLA_FLAGS" \
	JAX_COMPILATION_CACHE_DIR="$$cache/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$$cache/python" \
	$(1) -m pytest -n auto --dist loadfile --no-loadscope-reorder
# The tests that depend most on the versions of jax, flax and orbax.
CORE := $(patsubst %,tests/test_%.py,llama checkpoint_model)
PIP := -m pip --disable-pip-version-check --quiet --quiet

# Without a GPU the CUDA library is only loaded: machine code for one architecture is enough, where all take a minute
# more, and so is code that is hardly optimised, which takes half of the rest, or two thirds with an older nvcc. As
# little is made of XLA's entry points, which run once a product, and of the code for other processors: for vectors that
# this one hasn't, and, where it has vectors, for those without.
FAST_NVCC := $(if $(shell nvcc --help 2>/dev/null | grep -e --Ofast-compile),-Ofc=max -Xcompiler=-O0,-Xcicc=-O1 -Xptxas=-O1)
has = $(shell test -r /proc/cpuinfo && { grep -q -w $(1) /proc/cpuinfo && echo yes || echo no; })
LIGHT := _handler _handlers $(if $(filter no,$(call has,avx512bw)),_avx512 _avx512vnni _avx512vbmi) \
	$(if $(filter yes,$(call has,avx2)),_portable)
space := $(subst ,, )
ONE_GPU := $(if $(shell nvidia-smi -L 2>/dev/null),,-C cmake.define.CMAKE_CUDA_ARCHITECTURES=90 \
	-C "cmake.define.CMAKE_CUDA_FLAGS=$(FAST_NVCC)" \
	-C "cmake.define.ANY4_LIGHT=$(subst $(space),;,$(strip $(LIGHT)))")

# $(call find_python,NAMES,LEAST): prints the first interpreter of at least that sys.hexversion, from PATH, then
# from pyenv. Each is run, because pyenv has shims for versions that it then refuses to start.
find_python = { printf '%s\n' $(1); ls -d "$$(pyenv root 2>/dev/null)"/versions/*/bin/python3 2>/dev/null | sort -rV; } \
	| while read -r candidate; do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.hexversion < $(2))' </dev/null >/dev/null 2>&1; \
	    then echo "$$candidate"; break; fi; \
	  done
FIND_ANY := $(call find_python,python3 python3.11 python3.12 python3.13 python3.14,0x030B0000)
FIND_NEWEST := $(call find_python,python3.14 python3.13 python3.12,0x030C0000)
# The second run of the tests adds nothing if .venv itself is on Python 3.12 or newer.
NEWEST_IF_OTHER := if .venv/bin/python -c 'import sys; sys.exit(sys.hexversion >= 0x030C0000)'; then $(FIND_NEWEST); fi

help:
	@echo "make demo      quantize a real small model to 4 bits, compare, generate, save and load"
	@echo "make test      format check, lint, types, all tests; the core tests again on the newest Python"
	@echo "make test-all  all tests, those too that repeat at length what others check; several minutes more"
	@echo "make test-peers  models of Tunix, Gemma and MaxText in 4 bits, those that are installed in .venv"
	@echo "make lint      format check, lint and types only"
	@echo "make sanitize  the C++ kernels under sanitizers, two minutes; where there is a GPU the CUDA kernels too"
	@echo "make fuzz      two thousand mutated inputs, each a result or one sentence, fifteen minutes; CASES, FIRST"
	@echo "make clean     remove the virtual environments, caches and build products"

demo: .venv/demo.stamp
	@.venv/bin/any4 demo

# With --jobs=2, the work that uses one core (unpacking packages, checking types) runs beside the compilers.
test: lint .venv/native.stamp newest
	@[ -n "$$($(NEWEST_IF_OTHER))" ] || echo "one run only: no Python 3.12 or newer was found beside the one of .venv"
	@$(call PYTEST,.venv/bin/python)
	@[ -z "$$($(NEWEST_IF_OTHER))" ] || $(MAKE) --no-print-directory test-newest

test-all: lint .venv/native.stamp
	@$(call PYTEST,.venv/bin/python) --at-length

newest: .venv/bin/python
	@[ -z "$$($(NEWEST_IF_OTHER))" ] || $(MAKE) --no-print-directory .venv-newest/dev.stamp

test-newest: .venv-newest/dev.stamp
	@$(call PYTEST,.venv-newest/bin/python) -m "not slow and not sanitize" $(CORE)

# With the packages that are installed in .venv: pip install google-tunix gemma. The others' tests skip themselves.
test-peers: .venv/dev.stamp
	@.venv/bin/python -m pytest tests/peers

# Two minutes of compiling, which a change of Python code doesn't need.
sanitize: .venv/dev.stamp
	@.venv/bin/python -m pytest -m sanitize tests/test_native_build.py tests/test_cuda_sanitizers.py

# CI runs the first two hundred; FIRST begins elsewhere.
fuzz: .venv/dev.stamp
	@PYTHONPATH=tests .venv/bin/python -m fuzz --cases $(or $(CASES),2000) --first $(or $(FIRST),1000)

lint: .venv/dev.stamp
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

clean:
	@rm -rf .venv .venv-newest .cache .mypy_cache .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@python=$$($(FIND_ANY)); \
	if [ -z "$$python" ]; then \
	  echo "make: found no Python 3.11 or newer with venv and ensurepip on PATH or in pyenv; install one" >&2; exit 1; fi; \
	"$$python" -m venv --clear .venv

.venv-newest/bin/python:
	@"$$($(FIND_NEWEST))" -m venv --clear .venv-newest

# Editable, so that an edit needs no new installation and data files are read in place.
.venv/demo.stamp: $(INSTALL_INPUTS) | .venv/bin/python
	@echo "installing any4_jax into .venv"
	@.venv/bin/python $(PIP) install $(ONE_GPU) -e .
	@touch $@

# An older pip takes twice the time to choose and unpack seventy packages. Without bytecode, of which tests need little,
# this takes a minute less. Without the native libraries, because lint doesn't need them and .venv-newest tests the XLA
# backends, which the first run seldom uses.
%/dev.stamp: $(INSTALL_INPUTS) | %/bin/python
	@echo "installing any4_jax and its development tools into $*"
	@$*/bin/python $(PIP) install --no-compile --upgrade pip
	@$*/bin/python $(PIP) install --no-compile -C wheel.cmake=false -e '.[dev]'
	@rm -f $*/demo.stamp
	@touch $@

.venv/native.stamp: .venv/dev.stamp
	@echo "compiling its native libraries"
	@.venv/bin/python $(PIP) install --no-compile --no-deps $(ONE_GPU) -e .
	@touch $@ .venv/demo.stamp
