# Two commands: `make repro` rebuilds every figure, `make test` checks everything.
# Both set up .venv from the exact pins in constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
PIPELINE := $(if $(filter paper,$(PROFILE)),params/paper/dvc.yaml,dvc.yaml)
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
# Freed buffers stay with the process: without this the C library returns every large one to the kernel.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: help setup repro test lab bench studies lint clean

help:
	@echo "make repro    rebuild every result and figure (PROFILE=paper: ImageNet, needs a GPU and a hub token)"
	@echo "make test     lint, types, unit tests, every notebook in its smoke profile"
	@echo "make lab      JupyterLab with the right kernel"
	@echo "make bench    images per second and peak memory, printed and saved to results/bench.parquet"
	@echo "make studies  rerun the frozen stages (training; hours)"

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

repro: $(READY)
	dvc repro $(PIPELINE)

studies: $(READY)
	dvc repro --force --single-item train_vit train_llava search_study imagenet_study privacy_study

test: lint
	pytest -n 2 --dist loadfile --doctest-modules
	pytest --nbval-lax --nbval-cell-timeout=600 notebooks

lint: $(READY)
	ruff check .
	ruff format --check lib tests
	mypy
	nbstripout --verify notebooks/*.ipynb

lab: $(READY)
	jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. notebooks/00_tour.ipynb

bench: $(READY)
	python -m tokmerge.bench

clean:
	rm -rf results executed .pytest_cache .ruff_cache .mypy_cache
