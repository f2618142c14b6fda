# Every command a person needs. Bare `make` lists them.
PYTHON ?= python3
RUN := .venv/bin/python
TESTS ?=
# Two processes; a file stays in one of them, with the engines that its tests share.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
WHEEL = $(wildcard .venv/wheels/vllm-0.33.0-*.whl)

.DEFAULT_GOAL := help
.PHONY: help setup demo test browser early-warning gpu gpu-bundle lint format types check bench-host prove compat docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv: real vLLM for the CPU, this project, its CPU lane
	@$(PYTHON) cpulane/make_venv.py

demo: setup  ## the main job: real vLLM on this CPU, patched against stock
	@$(RUN) -m vllm_ext demo $(ARGS)

test: setup browser  ## all tests; those that need a GPU are reported as not run (TESTS=path)
	@$(RUN) -m pytest $(WORKERS) -m "not early_warning" $(TESTS)

browser:  ## Chromium, which one test looks at a page with; installed on Debian as root
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; done; \
	echo "setup: installing Debian's chromium"; \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	  >/dev/null || echo "setup: install Chromium, or the test of a page will fail"

early-warning: setup  ## the CPU lane on vLLM 0.33.0, which has no CPU build; may fail
	@$(RUN) -m pytest $(WORKERS) -m early_warning tests

gpu-bundle: setup  ## stock vLLM in one file, for a GPU host without network (docs/gpu-host.md)
	@$(RUN) -m vllm_ext.microbench.gpu_host.pack $(ARGS)

gpu:  ## the tests that need a GPU, on a machine that has one
	@python -m pytest -m gpu tests

lint: setup  ## ruff: check and format
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: setup  ## ruff: repair what can be repaired
	@$(RUN) -m ruff check --fix -q . ; $(RUN) -m ruff format -q .

types: setup  ## mypy on the package as it installs
	@rm -rf build/typecheck
	@.venv/bin/uv pip install -q --no-deps --no-build-isolation --target build/typecheck .
	@MYPYPATH=build/typecheck $(RUN) -m mypy -p vllm_ext --python-executable $(RUN)

prove: setup  ## what is proven of every patch and kernel without a GPU
	@$(RUN) -m vllm_ext prove all $(ARGS)

compat: setup  ## the fit of every patch on the vLLM versions at hand
	@$(RUN) -m vllm_ext doctor
	@$(RUN) -m vllm_ext doctor --vllm $(WHEEL)

bench-host: setup  ## host cost of a decode step, stock against patched, no GPU needed
	@$(RUN) -m vllm_ext bench host $(ARGS)

docs: setup  ## write the generated tables of the READMEs anew
	@$(RUN) -m vllm_ext.tables

wheel: setup  ## build sdist and wheel into dist/
	@.venv/bin/uv build -q --no-build-isolation -o dist .

check: lint types compat test  ## the one command before a push

clean:  ## remove .venv and what was built
	@rm -rf .venv build dist *.egg-info cpulane/*.egg-info
