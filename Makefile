# `make demo` trains a small SPHINX through all its stages; `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUT = outputs/$(RECIPE)
TRAIN = $(PY) train.py experiment=$(RECIPE) overwrite=true
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo sample-full test test-long lint types build clean

help:
	@echo "make demo       the whole pipeline on sample data: ends with a table and outputs/demo/report.html"
	@echo "make sample-full  the same recipe with more steps and data (an hour)"
	@echo "make test       the tests (up to 15 minutes)"
	@echo "make test-long  what takes longer, such as many kills (log in docs/logs/)"
	@echo "make lint       ruff          make types  mypy          make build  the wheel"

venv: $(STAMP)

# The tested set of versions is constraints.txt; setup.cfg has the lower bounds.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[sample,tensorboard,web,slurm,dev]'
	@touch $@

# Nothing here that is not a command of its own in the README. Finished steps are made anew. The runs without text stop
# early, where their runs with text had their held-out losses too.
demo: RECIPE = demo
demo: DATA = sample_demo
demo: ROOT = data/sample
demo: SCALE = 1
demo: WITHOUT_TEXT = pretrain_synthetic
demo: EARLY = 100
demo: LIMIT = limit=60
sample-full: RECIPE = sample_full
sample-full: DATA = sample
sample-full: ROOT = data/sample_full
sample-full: SCALE = 4
sample-full: WITHOUT_TEXT = pretrain_real pretrain_synthetic finetune
sample-full: EARLY = 250
sample-full: LIMIT = limit=100 data.root=$(ROOT)
demo sample-full: venv
	$(PY) -m sphinx_pl.data.sample --out $(ROOT) --scale $(SCALE)
	$(TRAIN) stage=pretrain_real
	$(TRAIN) stage=pretrain_synthetic
	$(PY) mix_weights.py checkpoints=[$(OUT)/pretrain_real/model,$(OUT)/pretrain_synthetic/model] beta=0.5 out=$(OUT)/mixed curve=11 'curve_sources=[real,synthetic]' data=$(DATA) data.root=$(ROOT) overwrite=true
	$(TRAIN) stage=finetune
	set -e; for stage in $(WITHOUT_TEXT); do $(TRAIN) stage=$$stage run=$${stage}_notext data.sources.text=null ++data.sources.chat=null stage.text_required=false trainer.max_steps=$(EARLY); done
	$(PY) evaluate.py checkpoint=$(OUT)/finetune/model $(LIMIT) report=$(OUT)/report.html

test: venv
	$(PY) -m pytest

test-long: venv
	mkdir -p docs/logs
	bash -c 'set -o pipefail; $(PY) -m pytest -m long --timeout 1800 -v --no-header 2>&1 | tee docs/logs/test-long.log'

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: venv
	$(PY) -m mypy

build: venv
	$(PY) -m build

clean:
	rm -rf outputs multirun build dist *.egg-info
