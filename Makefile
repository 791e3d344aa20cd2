# make setup       the environment in .venv
# make quickstart  the main job on the embedded model and charts: train, then base against prompted against tuned
# make notebook    execute notebooks/chartqa.ipynb and write its outputs into it
# make serving-table  fill the table of docs/serving.md, by real engines: what benchmarks/serving_cpu.json does not hold yet
# make test        the tests;  make test-all  the long ones too, as CI does;  make check  linters and types
# make test-newer  what depends most on PyTorch, with the newer one of constraints-newer.txt, as CI does
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWER := .venv-newer
RUN := runs/quickstart

.PHONY: setup quickstart notebook serving-table test test-all test-newer check ci clean

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

# More files at a time than a machine of two cores has: many tests wait for a process, a job or a browser. Long tests hold more.
# Bytecode is kept whatever the shell says: every process that starts would compile the package anew.
CLEAN := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1
OPTIONS := --dist loadfile --no-loadscope-reorder
PYTEST := $(CLEAN) $(BIN)/python -m pytest $(OPTIONS)

test: setup
	$(PYTEST) -n 5 -m 'not long'

test-all: setup
	$(PYTEST) -n 4

# All else is that of the environment: a second one holds the newer PyTorch alone, which is found first.
$(NEWER)/.installed: $(VENV)/.installed constraints-newer.txt
	rm -rf $(NEWER)
	$(PYTHON) -m venv --without-pip $(NEWER)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(NEWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(BIN)/pip --python $(NEWER)/bin/python install --quiet --disable-pip-version-check \
		--constraint constraints-newer.txt torch torchvision
	@touch $@

# Every family packed and shared, mixtures of experts, kernels in Triton's interpreter, FP8, changes to libraries.
NEWER_TESTS := tests/unit/test_adapter_layout.py tests/unit/test_batches.py tests/unit/test_compat.py \
	tests/unit/test_4bit_rows.py tests/unit/test_engine_parts.py tests/unit/test_families.py tests/unit/test_fp8.py \
	tests/unit/test_fsdp.py tests/unit/test_packing.py tests/unit/test_triton_kernels.py \
	tests/integration/test_attention.py tests/integration/test_expert_adapters.py tests/integration/test_experts.py \
	tests/integration/test_kernels.py tests/integration/test_packed.py tests/integration/test_qwen3_5.py

test-newer: $(NEWER)/.installed
	PYTHONPATH=src $(CLEAN) $(NEWER)/bin/python -m pytest $(OPTIONS) -n 4 $(NEWER_TESTS) -k 'not tested_versions_are_not_told'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ci: check test-newer test-all

clean:
	rm -rf $(VENV) $(NEWER) runs
