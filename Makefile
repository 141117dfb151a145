PYTHON ?= python3
VENV ?= .venv

MLIP := $(VENV)/bin/mlip
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-quick smoke check format bench gpu ablation schema clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=/path/to/python3.11 picks the Python, VENV=/path the environment (.venv)"

# One recipe for all that need an environment; it is made again when the dependencies change.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON): not a Python of version 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV): a few minutes and a few GB, once" >&2
	@start=$$(date +%s) && \
		$(PYTHON) -m venv $(VENV) && \
		$(RUN) -m pip install --disable-pip-version-check -e ".[dev]" && \
		touch $@ && \
		echo "installation took $$(($$(date +%s) - start)) s" >&2

demo: $(READY) ## Prepare OpenMoji, pretrain CLIP and MLIP, compare and report both (minutes; goes on where it stopped)
	@start=$$(date +%s) && \
		$(MLIP) prepare-data openmoji data/openmoji && \
		$(MLIP) pretrain recipes/openmoji_clip.yaml --out runs/openmoji_clip --resume && \
		$(MLIP) pretrain recipes/openmoji.yaml --out runs/openmoji --resume && \
		$(MLIP) eval-zeroshot runs/openmoji_clip runs/openmoji --merge-rate 0,0.5 \
			--dataset openmoji_combinations,openmoji && \
		{ ls runs/openmoji/evals/merge_sweep_* >/dev/null 2>&1 || \
			$(MLIP) merge-sweep runs/openmoji --rates 0.3,0.5 --dataset openmoji_combinations; } && \
		{ ls runs/openmoji/evals/profile_* >/dev/null 2>&1 || $(MLIP) profile runs/openmoji; } && \
		$(MLIP) search runs/openmoji "woman judge: dark skin tone" "flag of japan" "a red heart" --images data/openmoji && \
		report=$$($(MLIP) report runs/openmoji_clip runs/openmoji) && \
		echo "the demo took $$(($$(date +%s) - start)) s, installation not counted; open in a browser:" >&2 && \
		echo "$$report"

# A file stays in one process: its tests share fixtures, and README's lines follow one another.
PYTEST := $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY) ## Run all tests, in some minutes
	@$(PYTEST)

test-quick: $(READY) ## Run the tests without the mark slow, in about a minute
	@$(PYTEST) -m "not slow"

smoke: $(READY) ## Run the commands once on real data, in a temporary folder
	@$(RUN) tests/smoke.py

check: $(READY) ## Lint, formatting, types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(READY) ## Format the code and mend what can be mended
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(READY) ## Run the measurements of tests/benchmarks, an hour or two; nothing else should run beside them
	@$(RUN) -m pytest -q -s -o python_files='bench_*.py' -o timeout=0 tests/benchmarks

gpu: $(READY) ## Check numbers, speed and commands on one CUDA GPU, in 8 minutes at most: [OUT=gpu.json]
	@PYTHONPATH=tests $(RUN) -m gpu $(if $(OUT),--out $(OUT))

ablation: $(READY) ## Train and compare recipes/ablation, days: DATA=FOLDER_OF_TARS [STAGES=PSHCE] [JOBS=N] (goes on where it stopped)
	@test -n "$(DATA)" || { echo "error: name the data: make ablation DATA=FOLDER_OF_TARS" >&2; exit 2; }
	@test -d data/ablation/train_half || PYTHONPATH=tests $(RUN) -m ablation.prepare "$(DATA)" data/ablation
	@PYTHONPATH=tests $(RUN) -m ablation.train_all data/ablation runs/ablation $(if $(STAGES),--stages $(STAGES)) $(if $(JOBS),--jobs $(JOBS))
	@PYTHONPATH=tests $(RUN) -m ablation.verdict runs/ablation

schema: $(READY) ## Write recipes/schema.json from the models of config.py
	@$(RUN) -c 'from pathlib import Path; from mlip_cli.recipe.load import schema_text; Path("recipes/schema.json").write_text(schema_text())'

clean: ## Remove caches and builds; data/, runs/ and the environment stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	@find mlip_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +
