PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo check test test-plain test-slow test-gpu docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	touch $@

demo: install
	$(BIN)/penstock demo

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

test: install
	$(BIN)/pytest

# What depends on the processor, as on one with AVX2 alone: a plainer kind can be made of a richer one.
test-plain: install
	DNNL_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/pytest \
	  tests/unit/core/test_processor.py tests/unit/train/test_machine.py tests/unit/train/test_precision.py \
	  tests/conformance/test_optim_optimizer.py

test-slow: install
	$(BIN)/pytest -m slow

test-gpu: install
	$(BIN)/pytest -m gpu

docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv runs
