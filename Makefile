# make setup       the environment in .venv
# make quickstart  the main job on the embedded model and charts: train, then base against prompted against tuned
# make notebook    execute notebooks/chartqa.ipynb and write its outputs into it
# make serving-table  fill the table of docs/serving.md, by real engines: what benchmarks/serving_cpu.json does not hold yet
# make test        the tests;  make test-all  the long ones too, as CI does;  make check  linters and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: setup quickstart notebook serving-table test test-all check ci clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	@# DeepSpeed's setup imports torch, which an isolated build would download once more.
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation \
		--editable '.[dev,deepspeed,demo]'
	@touch $@

quickstart: setup
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml scripts/sft.py \
		--recipe recipes/quickstart.yaml --output_dir $(RUN) --overwrite_output_dir true
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml scripts/evaluate.py \
		--run $(RUN) --arms base,prompted,tuned --split test --overwrite

notebook: setup
	PYTHONPATH=tests $(BIN)/python -m fixtures.notebook

serving-table: setup
	PYTHONPATH=tests $(BIN)/python -m fixtures.serving_table

# Four files at a time on two cores: many tests wait for a process, a job or a browser.
# Bytecode is kept whatever the shell says: every process that starts would compile the package anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m 'not long'

test-all: setup
	$(PYTEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ci: check test-all

clean:
	rm -rf $(VENV) runs
