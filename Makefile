# Every target that needs Python makes .venv first. `make` alone prints this help.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Another package index for torch alone; on a machine without a GPU the CPU build is 10 times smaller:
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := torch==2.13.0
CONSTRAINTS ?= constraints.txt

BACKBONE ?= minilm
NOTEBOOK ?= 02_roberta_base
DEMO := runs/demo
DEMO_NAME = $(subst -,_,$(NOTEBOOK))
DEMO_RUN = $(DEMO)/$(DEMO_NAME)-$(notdir $(BACKBONE))
NOTEBOOKS := $(patsubst notebooks/%.py,%,$(wildcard notebooks/0*.py))

# of the kaggle- targets: your Kaggle name; settings, and a file of them in notebooks/params; finished run folders and
# their blend.json; test rows of the rehearsal's rerun
OWNER ?=
SET ?=
PRESET ?=
RUNS ?=
ROWS ?= 300
# they take only what was given for these two, not the defaults above
GIVEN_NOTEBOOK := $(if $(filter file,$(origin NOTEBOOK)),,$(NOTEBOOK))
GIVEN_BACKBONE := $(if $(filter file,$(origin BACKBONE)),,$(BACKBONE))
KAGGLE_RUN = "$(OWNER)" "$(GIVEN_NOTEBOOK)" --preset "$(PRESET)" --set $(SET) --backbone "$(GIVEN_BACKBONE)"

.PHONY: help install demo test test-oldest lint notebooks figs study report kaggle-first kaggle-train kaggle-watch kaggle-submit \
  kaggle-bundle kaggle-rehearsal benchmark gpu-check

help: ## print this help
	@echo "prefcls: predict which of two LLM answers people prefer"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(VENV)/installed ## make .venv with the tested versions (TORCH_INDEX=URL: torch from there)

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[notebooks,demo,test,kaggle,report]'
	@touch $@
	@echo "installed into $(VENV); next: make demo"

demo: install ## run one notebook on the shipped rows with a small pretrained encoder (BACKBONE= NOTEBOOK=)
	@test -f notebooks/$(DEMO_NAME).ipynb || { echo "NOTEBOOK=$(NOTEBOOK): choose one of" notebooks/*.ipynb; exit 2; }
	@mkdir -p $(DEMO)
	@echo "two to three minutes on two idle cores, more beside other work; the bar counts cells of the notebook and stands still while the network trains"
	$(BIN)/papermill notebooks/$(DEMO_NAME).ipynb $(DEMO)/$(DEMO_NAME).ipynb --kernel python3 --progress-bar \
	  -f notebooks/params/demo.yaml -r backbone "$(BACKBONE)" -r out $(DEMO_RUN)
	@$(BIN)/jupyter nbconvert --to html --log-level ERROR $(DEMO)/$(DEMO_NAME).ipynb
	@$(BIN)/prefcls run --config notebooks/params/demo.yaml --set backbone="$(BACKBONE)" --out $(DEMO_RUN)
	@echo "page to look at: $(DEMO)/$(DEMO_NAME).html"

test: install lint ## run the linter and the tests, in a process for each core (8 at most)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-oldest: ## the same on the oldest packages that are supported, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: install ## check style and format of the code (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: install ## build notebooks/*.ipynb from their .py
	$(BIN)/python notebooks/build.py $(NOTEBOOKS)

figs: install ## draw the figures in figs/ (SVG and PNG) from their code
	@$(BIN)/python -m figs

benchmark: install ## speed beside that of Hugging Face Trainer and of the study's loop, into report/studies/
	$(BIN)/python -m report.studies.benchmark

gpu-check: install ## on a machine with a GPU: speed, memory, precision, waits, a resume, each with a verdict (ARGS=)
	@$(BIN)/python -m report.studies.gpu_check $(ARGS)

report: install ## build report/report.html and report.pdf from run folders, and the table in README.md (RUNS=)
	@$(BIN)/python -m report.build --runs report/runs $(RUNS) --readme README.md

study: install ## baselines and networks on the shipped rows, five folds, for the report (under an hour on 2 cores)
	@$(BIN)/python -m report.studies.study

kaggle-first: install ## two short trainings and a submission on Kaggle: which assumptions are true there (OWNER=)
	@$(BIN)/python kaggle/first.py "$(OWNER)"

kaggle-train: install ## train on Kaggle and bring the run back into runs/ (OWNER= NOTEBOOK= PRESET= SET= BACKBONE=)
	@$(BIN)/python kaggle/train.py $(KAGGLE_RUN)

kaggle-watch: install ## follow a kernel that runs, or download the output of one that has ended (OWNER= NOTEBOOK=)
	@$(BIN)/python kaggle/train.py "$(OWNER)" "$(GIVEN_NOTEBOOK)" --watch

kaggle-submit: install ## submit the runs of the training kernels, or RUNS=, and bring the public score back (OWNER=)
	@$(BIN)/python kaggle/submit.py "$(OWNER)" --runs $(RUNS)

kaggle-bundle: install ## build what kaggle-train would send, into dist/kaggle (OWNER= NOTEBOOK= PRESET= SET= BACKBONE=)
	@$(BIN)/python kaggle/train.py $(KAGGLE_RUN) --build

kaggle-rehearsal: install ## run the notebooks in dist/kaggle here as Kaggle would, without a network (ROWS=)
	@$(BIN)/python kaggle/rehearsal/rehearse.py --rows $(ROWS)
