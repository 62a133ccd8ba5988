# Everything runs from .venv, which the first target that needs it makes. Needs Python 3.10 to 3.13 (tested with 3.11) and about 7 GB of disk.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
INSTALLED = .venv/.installed
JOBS ?= 2
NBTEST = $(BIN)/python .ci/notebooks.py --jobs $(JOBS)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 15 \
	-o tmp_path_retention_policy=failed -o tmp_path_retention_count=1

.PHONY: help install install-locked lock licences audit sbom wheel demo gauge gpu test test-slow export readme docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED) ## make .venv and install the pinned versions (a few minutes)

$(INSTALLED): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install-locked: ## the same, but only files whose hash is in requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(INSTALLED)

LOCK = UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile -q setup.py --extra dev -c constraints.txt --universal --python-version 3.10 --generate-hashes --no-annotate --refresh

lock: install ## requirements.lock, for Python 3.10 to 3.13, from settings.ini and constraints.txt
	$(LOCK) -o requirements.lock

licences: install ## the licence of each installed package; fails on one that is unknown or not free to use
	$(BIN)/python .ci/licences.py

audit: install ## known vulnerabilities of what requirements.lock installs (needs a network)
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

sbom: install ## dist/sbom.json: what is installed, as CycloneDX
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --output-reproducible --of JSON -o dist/sbom.json

wheel: install ## dist/*.whl, installed in an environment of its own, where the demo runs
	.ci/wheel

demo: install ## train, prune and fine-tune a small ViT on handwritten digits
	$(BIN)/attn_diversity_demo

gpu: install ## what only a GPU can say, in ten minutes: attn_diversity_gpu/report.md (ARGS=--rehearse: on the CPU)
	$(BIN)/python .ci/gpu.py $(ARGS)

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
	rm -rf _proc _docs build dist attn_diversity_bench attn_diversity_choose attn_diversity_demo attn_diversity_evaluate attn_diversity_gpu attn_diversity_sweep attn_diversity_train
