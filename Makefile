# Everything runs from .venv, which the first target that needs it makes. Needs Python 3.10 to 3.13 (tested with 3.11) and about 7 GB of disk.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
INSTALLED = .venv/.installed
JOBS ?= 2
NOTEBOOKS = $(wildcard nbs/*.ipynb nbs/tutorials/*.ipynb)
# a process a notebook, so that none inherits the memory of another; one thread each, or they would be in each other's way
NBTEST = @printf '%s\n' $(NOTEBOOKS) | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I NB $(BIN)/nbdev_test --path NB --n_workers 0 --do_print --timing
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n $(JOBS) --dist loadfile --durations 15

.PHONY: help install demo gauge test test-slow export readme docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED) ## make .venv and install the pinned versions (a few minutes)

$(INSTALLED): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## train, prune and fine-tune a small ViT on handwritten digits
	$(BIN)/attn_diversity_demo

gauge: install ## what code must look like: ruff's rules, no private names of others, no import circles
	$(BIN)/python .ci/gauge.py

SHARED = @test -d ../shared || echo 'SKIPPED: there is no ../shared beside the project, so notebooks take untrained weights (or a hub) and leave out what needs its data.'

test: install ## every notebook and tests/, without slow and GPU cells
	$(SHARED)
	$(NBTEST)
	$(PYTEST) -m 'not slow' tests

test-slow: install ## the same with the slow cells
	$(SHARED)
	$(NBTEST) --flags slow
	$(PYTEST) tests

export: install ## notebooks to modules, and clean notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: install ## README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: install ## the site in _docs, by Quarto where there is one, else by smalldocs; runs no notebook
	$(BIN)/python .ci/docs.py

clean: ## remove what commands and builds wrote
	rm -rf _proc _docs build dist attn_diversity_bench attn_diversity_demo attn_diversity_train attn_diversity_sweep
