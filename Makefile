# `make repro` rebuilds every figure, `make test` checks everything, `make help` lists the rest.
# Each sets up .venv from requirements.lock on first use.
PYTHON ?= python3
PROFILE ?= embedded
STUDY ?= $(if $(filter embedded,$(PROFILE)),train_vit train_llava) images_study \
  $(if $(filter photos,$(PROFILE)),,search_study questions_study) channel_study privacy_study
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
# Freed buffers stay with the process: without this the C library returns every large one to the kernel.
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: help setup repro verify site executed test test-browser test-gpu rehearse fuzz lab bench scale studies lint lock audit clean

help:
	@echo "make repro         rebuild every result and figure (PROFILE=smoke: minutes, laptop or paper: docs/)"
	@echo "make verify        compare the rebuilt numbers with the committed ones; fails if one moved too far"
	@echo "make site          a static site from executed notebooks, figures and docstrings: results/site/index.html"
	@echo "make executed      docs/executed from what was executed since (after make repro); studies are read, not run"
	@echo "make test          lint, types, unit tests, every notebook with its smoke values"
	@echo "make test-browser  the site and JupyterLab in a headless Chromium"
	@echo "make test-gpu      engine, LLaVA, channel and attackers on a GPU against the CPU"
	@echo "make rehearse      PROFILE=laptop or paper with models of real size, random weights and synthetic pictures (minutes)"
	@echo "make fuzz          decode 126,000 damaged payloads (minutes)"
	@echo "make setup         .venv from requirements.lock (the other commands do it on first use)"
	@echo "make lab           JupyterLab with the right kernel (PROFILE=embedded: with that profile's values)"
	@echo "make studies       rerun the frozen stages, training and studies (hours; STUDY=search_study: only this one)"
	@echo "make bench         images per second and peak memory, printed and saved to results/bench.parquet"
	@echo "make scale         measure how the cost grows and write docs/scale.md (minutes)"
	@echo "make lock          requirements.lock and constraints.txt from pyproject.toml, keeping what still fits"
	@echo "make audit         known vulnerabilities of the pinned packages (asks the package index)"
	@echo "make lint          ruff, mypy, stripped notebooks (part of make test)"
	@echo "make clean         remove results and caches; data, figures and .venv stay"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt uv
	uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	uv pip install --python $(BIN)/python --no-deps -e .
	touch $@

# What the figures show photographs with.
PHOTOS := $(if $(filter embedded,$(PROFILE)),inputs@photos search@photos)
# Inputs and search first: what a frozen study read must be there when dvc looks at it.
repro: $(READY)
	python -m tokmerge.preflight $(PROFILE)
	$(if $(filter smoke,$(PROFILE)),OMP_NUM_THREADS=1 python notebooks/preloaded.py sh notebooks/smoke.sh,\
	  dvc repro inputs@$(PROFILE) search@$(PROFILE) $(PHOTOS) && dvc repro figures@$(PROFILE))

verify: $(READY)
	python -m tokmerge.verify

site: $(READY) executed/embedded/00_tour.ipynb
	python docs/gather.py $(PROFILE) results/site.source
	rm -rf results/site.new
	python -m sphinx -q -c docs -d results/site.doctrees -w results/warnings.txt results/site.source results/site.new
	mv results/warnings.txt results/site.new/
	rm -rf results/site && mv results/site.new results/site

# The tour makes no table, so it is no stage; studies are stepped through as in JupyterLab: read, not run.
STEPPED = $(patsubst notebooks/%,executed/embedded/%,notebooks/00_tour.ipynb $(wildcard notebooks/*_study*.ipynb))

executed: $(READY) $(STEPPED)
	python docs/trim.py

$(STEPPED): executed/embedded/%.ipynb: notebooks/%.ipynb
	JPY_SESSION_NAME=$< sh notebooks/run.sh embedded $*

# What is frozen, and passed over by `dvc repro`: run, and dvc.lock told what it read and wrote.
studies: $(READY)
	set -e; for study in $(STUDY); do \
	  python -m tokmerge.preflight $(PROFILE) $$study; \
	  for file in notebooks/[0-9][0-9]_$$study*.ipynb; do sh notebooks/run.sh $(PROFILE) $$(basename $$file .ipynb); done; \
	  dvc commit -f $$study@$(PROFILE); \
	done

test: lint
	pytest -n 2 --dist loadfile --doctest-modules
	sh notebooks/nbval.sh

test-browser: site
	pytest tests/browser

lint: $(READY)
	ruff check .
	ruff format --check lib tests
	mypy
	nbstripout --verify notebooks/*.ipynb

# Skipped, with a word, where there is no GPU.
test-gpu: $(READY)
	pytest tests/gpu -rs

rehearse: $(READY)
	python notebooks/rehearse.py $(if $(filter laptop,$(PROFILE)),laptop,paper)

# Damaged payloads of every kind: 42,000 for each of the three tests that make them.
fuzz: $(READY)
	FUZZ=42000 pytest tests/test_wire.py -k "mutations or random_bytes"

# PROFILE=embedded: notebooks that are stepped through take that profile's values, not those of their own cells.
lab: $(READY)
	TOKMERGE_PROFILE=$(if $(filter command line,$(origin PROFILE)),$(PROFILE)) jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=. notebooks/00_tour.ipynb

bench: $(READY)
	python -m tokmerge.evaluation.timing

# KEEP=1: the shipped measurements stay, the pages are written from them.
scale: $(READY)
	sh notebooks/run.sh embedded 95_scale $(if $(KEEP),-p measure False)

lock: $(READY)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --all-extras --custom-compile-command 'make lock' pyproject.toml -o requirements.lock
	echo '# What requirements.lock pins, without its hashes, for pip and conda. `make lock` writes both.' > constraints.txt
	sed -n 's/ \\$$//; /^[a-z]/p' requirements.lock >> constraints.txt

# In an environment of its own, so that the auditor's own packages are none of ours; --strict: a package that could not
# be looked up is a failure, not a pass.
audit: $(READY)
	$(PYTHON) -m venv results/audit
	uv pip install --python results/audit/bin/python 'pip-audit>=2.9,<3'
	python -c 'from importlib.metadata import distributions as d; print(*sorted({f"{x.name}=={x.version}" for x in d() if x.name != "tokmerge"}), sep="\n")' > results/audit/installed.txt
	results/audit/bin/pip-audit --strict --no-deps --disable-pip -r results/audit/installed.txt

clean:
	rm -rf results executed .pytest_cache .ruff_cache .mypy_cache
