# make demo and make test work on a fresh clone: they create .venv and install what is missing.
#
#   PYTHON=python3.12 make demo    another interpreter (3.11 or newer)
#   FAISS=cpu make setup           install faiss-cpu (30 MB), for approximate indexes on a laptop
#   FAISS=1 make setup             install faiss-gpu without an nvidia-smi, too; FAISS=0: never
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                  Linux without a GPU: torch's CPU build, some gigabytes smaller

PYTHON ?= python3
PY := .venv/bin/python
# faiss-gpu is optional and a download of 878 MB (see requirements.txt). It is installed where it
# can use a GPU, or where you ask for it.
FAISS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),1,0)
# What becomes of the line of faiss-gpu in requirements.txt, by the value of FAISS.
FAISS_LINE_0 := /^faiss-gpu/d
FAISS_LINE_1 :=
FAISS_LINE_cpu := s/^faiss-gpu==\([^;]*\).*/faiss-cpu==\1/
JOBS ?= 2
STAMP := .venv/.installed-faiss$(FAISS)

.DEFAULT_GOAL := help
.PHONY: help setup test faults mutants lint demo reproduce reproduce-bard reproduce-qagent real-folders real \
  world clean

help:             ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)   ## create .venv and install the requirements

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "%s is Python %d.%d: this project needs 3.11 or newer; run make PYTHON=python3.11" \
	  % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv .venv
	@# pip takes requirements from files.
	@mkdir -p .venv/requirements
	@sed '$(FAISS_LINE_$(FAISS))' requirements.txt > .venv/requirements/requirements.txt
	@cp requirements-dev.txt .venv/requirements/
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  -r .venv/requirements/requirements-dev.txt
	@rm -f .venv/.installed-faiss*
	@touch $@

test: $(STAMP)    ## run the tests (ARGS="-k name" narrows them; JOBS=4: side by side)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist loadscope $(ARGS)

faults: $(STAMP)  ## kill runs at random, feed thousands of hostile texts and files (ten minutes)
	DGPO_EXAMPLES=$(or $(EXAMPLES),10000) $(PY) -m pytest -m "faults or not faults" \
	  tests/test_faults.py tests/test_hostile.py tests/test_parallel.py tests/test_retrieval.py $(ARGS)

mutants: $(STAMP) ## break the project in small ways; a test must notice each (ARGS="--only FILE")
	$(PY) tests/mutants.py $(ARGS)

lint: $(STAMP)    ## check style with ruff
	$(PY) -m ruff check .

demo: $(STAMP)    ## run the method on the embedded world: table, picture, episodes (minutes)
	$(PY) -m experiments.reproduce demo

reproduce: $(STAMP)  ## run every row of the paper's tables, three seeds (hours)
	$(PY) -m experiments.reproduce rows
	$(PY) -m experiments.reproduce pairs
	$(PY) -m experiments.guidance run

reproduce-qagent: $(STAMP)  ## run QAgent's stages, Search-R1 and naive RAG for two generators
	$(PY) -m experiments.qagent run

reproduce-bard: $(STAMP)  ## run BARD, its parts, another reward and truncation, three seeds
	$(PY) -m experiments.bard run

# Questions, passages and checkpoints are yours: docs/results/real.md says which. Before the setup:
real-folders:
	@$(foreach name,DATA ENCODER STUDENT,$(if $($(name)),,$(error make real: got no $(name), \
	  expected DATA=FOLDER ENCODER=DIR STUDENT=DIR; docs/results/real.md says what they hold)))

real: real-folders $(STAMP)  ## train and measure on real questions (DATA= ENCODER= STUDENT= [TEACHER=])
	[ -e runs/real/files/split.json ] || $(PY) -m experiments.real data --data $(DATA) \
	  --encoder $(ENCODER) --out runs/real/files
	$(PY) -m experiments.real run --files runs/real/files --student $(STUDENT) \
	  $(if $(TEACHER),--teacher $(TEACHER)) --encoder $(ENCODER)

world: $(STAMP)   ## rebuild the shipped world: corpus, questions, encoder, teacher, student
	$(PY) -m world.build build

clean:            ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
