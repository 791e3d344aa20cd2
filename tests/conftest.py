"""Settings of every session of tests, and the fixtures that any test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from fixtures.processes import warm_processes

pytest_plugins = ["fixtures.browser", "fixtures.messages", "fixtures.models"]

# A file is run by one worker. Those that take minutes begin first, so that none of them is left alone at the end.
LONGEST_FIRST = (
    "test_slurm.py",
    "test_checkpoints.py",
    "test_quickstart.py",
    "test_faults.py",
)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until the tests are collected
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Inside a job of a cluster, the worlds of the tests are smaller than what was allotted.
    os.environ.setdefault("QWEN_VL_SFT_EXPECTED_PROCESSES", "any")


def pytest_collection_finish() -> None:
    # The libraries stay for the whole session: the collector need not walk through their objects again and again.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches out of the user's home, also in the processes that tests start."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    with warm_processes():
        yield
