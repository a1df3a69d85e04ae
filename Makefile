# Two commands: `make demo` and `make test`. Both build .venv when it is missing or out of date, and reuse it otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt

.PHONY: help demo test test-all test-long lint bench clean
help:
	@echo "make demo   install into .venv, then SFT, reward model, DPO and PPO from nothing in a few minutes (runs/demo/report.html)"
	@echo "make test   install into .venv with the test tools, then lint, types and the tests"
	@echo "make test-all   the same and the tests marked grid, as continuous integration runs it"
	@echo "make test-long  the tests that 'make test' leaves out: every model family, learning runs held to bars (an hour; needs ../shared/data)"
	@echo "make lint   ruff and mypy alone"
	@echo "make bench  the CPU kernel benchmarks against their peers, a quarter of an hour (benchmarks/results/)"
	@echo "make clean  remove .venv and runs/demo"

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("onecard needs Python 3.10 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "installing the bench tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/onecard demo

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long and not grid" tests

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" tests

test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m long tests

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.kernels --device cpu

clean:
	rm -rf $(VENV) runs/demo
