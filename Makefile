# `make repro` rebuilds every figure, `make test` checks everything, `make help` lists the rest.
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

.PHONY: help setup repro verify report test test-browser fuzz lab bench scale studies lint audit clean

help:
	@echo "make repro         rebuild every result and figure (PROFILE=paper: ImageNet and LLaVA, docs/paper_profile.md)"
	@echo "make verify        compare the rebuilt numbers with the committed ones; fails if one moved too far"
	@echo "make report        a static site from executed notebooks and figures: results/report/index.html"
	@echo "make test          lint, types, unit tests, every notebook in its smoke profile"
	@echo "make test-browser  the report and JupyterLab in a headless Chromium"
	@echo "make fuzz          decode 126,000 damaged payloads (minutes)"
	@echo "make setup         .venv from the exact pins (the other commands do it on first use)"
	@echo "make lab           JupyterLab with the right kernel"
	@echo "make studies       rerun the frozen stages, training and studies (hours; STUDY=search_study: only this one)"
	@echo "make bench         images per second and peak memory, printed and saved to results/bench.parquet"
	@echo "make scale         measure how the cost grows and write docs/scale.md (minutes)"
	@echo "make audit         known vulnerabilities of the pinned packages (asks pypi.org)"
	@echo "make lint          ruff, mypy, stripped notebooks (part of make test)"
	@echo "make clean         remove results and caches; data, figures and .venv stay"

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

repro: $(READY)
	python -m tokmerge.preflight $(PROFILE)
	dvc repro $(PIPELINE)

verify: $(READY)
	python -m tokmerge.verify

report: $(READY) executed/embedded/00_tour.ipynb
	python -m tokmerge.report $(PROFILE)

# The tour makes no table, so it is no stage.
executed/embedded/00_tour.ipynb: notebooks/00_tour.ipynb
	mkdir -p $(@D)
	papermill $< $@ --cwd notebooks -f params/embedded/00_tour.yaml --log-output --no-progress-bar

# All that the pipeline marks as frozen, which `dvc repro` passes over.
studies: $(READY)
	python -m tokmerge.studies $(or $(PROFILE),embedded) $(STUDY)

test: lint
	pytest -n 2 --dist loadfile --doctest-modules
	pytest --nbval-lax --nbval-cell-timeout=600 notebooks

test-browser: report
	pytest tests/browser

lint: $(READY)
	ruff check .
	ruff format --check lib tests
	mypy
	nbstripout --verify notebooks/*.ipynb

# Damaged payloads of every kind: 42,000 for each of the three tests that make them.
fuzz: $(READY)
	FUZZ=42000 pytest tests/test_wire.py -k "mutations or random_bytes"

lab: $(READY)
	jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. notebooks/00_tour.ipynb

bench: $(READY)
	python -m tokmerge.bench

scale: $(READY)
	python -m tokmerge.scale

# In an environment of its own, so that the auditor's own packages are none of ours; --strict: a package that could not
# be looked up is a failure, not a pass.
audit: $(READY)
	$(PYTHON) -m venv results/audit
	results/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3'
	python -c 'from importlib.metadata import distributions as d; print(*sorted({f"{x.name}=={x.version}" for x in d() if x.name != "tokmerge"}), sep="\n")' > results/audit/installed.txt
	results/audit/bin/pip-audit --strict --no-deps --disable-pip -r results/audit/installed.txt

clean:
	rm -rf results executed .pytest_cache .ruff_cache .mypy_cache
