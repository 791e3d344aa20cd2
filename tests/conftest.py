"""Settings of every session of tests, and the fixtures that any test may use."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from fixtures.processes import warm_processes
from fixtures.warm_python import fork_workers

# Drawn examples are the same in every session, and none fails for its time; `--hypothesis-profile explore` draws others.
_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=_CHECKS)
settings.register_profile("explore", deadline=None, suppress_health_check=_CHECKS)
settings.load_profile("tests")

pytest_plugins = ["fixtures.browser", "fixtures.messages", "fixtures.models"]

# A file is run by one worker. Those that take longest begin first, so that none of them is left alone at the end; those
# that mostly wait begin beside those that mostly compute.
LONGEST_FIRST = (
    "test_experts_runs.py",
    "test_slurm.py",
    "test_quickstart.py",
    "test_preemption.py",
    "test_push.py",
    "test_mixed_batches.py",
    "test_notebook.py",
    "test_demo.py",
    "test_sft.py",
    "test_compare_strategies.py",
    "test_launch.py",
    "test_dense_families_runs.py",
    "test_serving_vllm.py",
    "test_serving_engines.py",
    "test_packed.py",
    "test_checkpoints.py",
    "test_engine.py",
    "test_report.py",
    "test_stall.py",
    "test_evaluation.py",
    "test_merge.py",
    "test_installed_wheel.py",
    "test_faults.py",
    "test_trainer.py",
    "test_memory.py",
    "test_reproducibility.py",
)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until the tests are collected
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Inside a job of a cluster, the worlds of the tests are smaller than what was allotted.
    os.environ.setdefault("QWEN_VL_SFT_EXPECTED_PROCESSES", "any")
    if hasattr(config, "workerinput"):
        return
    # A proxy of this machine is none for servers of the tests.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    # What `datasets` caches stays out of the user's home; it and the processes of tests read this when they start.
    cache = tempfile.TemporaryDirectory(prefix="datasets-of-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name
    if getattr(config.option, "tx", None):
        config.add_cleanup(fork_workers(os.environ).close)


def pytest_collection_finish() -> None:
    # The libraries stay for the whole session: the collector need not walk through their objects again and again.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # What a test draws, and the fixtures that it is the first to ask for, is the same whatever ran before.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(scope="session", autouse=True)
def forked_processes() -> Iterator[None]:
    """Have the processes that tests start forked."""
    with warm_processes():
        yield
