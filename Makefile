# `make demo` trains a small SPHINX through all its stages; `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo sample-full real test test-long lint types build clean

help:
	@echo "make demo       the whole pipeline on sample data: ends with a table and outputs/demo/report.html"
	@echo "make sample-full  the same recipe with more steps and data (an hour); both resume; ARGS=redo=all repeats all"
	@echo "make real       the recipe on real pictures, text and weights from published packages (docs/real.md)"
	@echo "make test       the tests (13 minutes on two cores)"
	@echo "make test-long  what takes longer, such as many kills (log in docs/logs/)"
	@echo "make lint       ruff          make types  mypy          make build  the wheel"

venv: $(STAMP)

# The tested set of versions is constraints.txt; setup.cfg has the lower bounds.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sample,eval,tensorboard,gguf,web,slurm,dev]'
	@touch $@

# The steps are in conf/pipeline/experiment/. It resumes; ARGS=redo=all repeats everything. Any other
# override too: make demo ARGS="finetune:stage.max_steps=100 scale=2".
demo: RECIPE = demo
sample-full: RECIPE = sample_full
real: RECIPE = real
demo sample-full real: venv
	$(PY) -m sphinx_pl.cli.pipeline experiment=$(RECIPE) $(ARGS)

# A process for each core; on many cores eight, since each imports PyTorch and makes the sample world for itself.
test: venv
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-long: venv
	mkdir -p docs/logs
	bash -c 'set -o pipefail; $(PY) -m pytest -m long --timeout 7200 -v --no-header 2>&1 | tee docs/logs/test-long.log'

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: venv
	$(PY) -m mypy

build: venv
	$(PY) -m build

clean:
	rm -rf outputs multirun build dist *.egg-info
