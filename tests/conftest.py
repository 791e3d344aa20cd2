"""Fixtures of all tests: the real tokenizer and data when they lie beside the repository, a small random model, rows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
PROCESS_TIMEOUT = 600
RED, BLUE = "images/red.png", "images/blue.png"

# The smallest shape whose layers bitsandbytes can quantize on a CPU.
SMALL_SHAPE: dict[str, Any] = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
}


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Inside a job of a cluster, the worlds of the tests are smaller than what was allotted.
    os.environ.setdefault("QWEN_VL_SFT_EXPECTED_PROCESSES", "any")


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what `datasets` caches out of the user's home."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and the real tokenizer."""
    if not SHARED.is_dir():
        pytest.skip(f"real data and tokenizer are not beside the repository ({SHARED.name}/)")
    return SHARED


@pytest.fixture(scope="session")
def real_processor(shared: Path) -> Any:
    """The processor of Qwen2-VL."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(shared / "qwen2vl")


@pytest.fixture(scope="session")
def tiny_processor() -> Any:
    """The processor of the model that comes with the package."""
    from transformers import AutoProcessor

    from qwen_vl_sft import tiny

    return AutoProcessor.from_pretrained(tiny.MODEL_DIR)


@pytest.fixture(scope="session")
def small_model(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-VL of the smallest shape with the real tokenizer, in float32."""
    from qwen_vl_sft.modeling.random_model import make_random_model

    folder = tmp_path_factory.mktemp("models") / "small"
    make_random_model(
        str(shared / "qwen2vl/config-2b"), folder, str(shared / "qwen2vl"), dtype="float32", overrides=SMALL_SHAPE
    )
    return folder


def png(color: str = "red", size: tuple[int, int] = (56, 56)) -> bytes:
    """A drawn image as PNG bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def messages_folder(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes rows of messages as a local dataset: train.jsonl beside images/red.png and images/blue.png."""

    return lambda rows: write_messages(tmp_path / "data", rows)


def write_messages(folder: Path, rows: list[dict[str, Any]], size: tuple[int, int] = (56, 56)) -> Path:
    """Write rows of messages as a local dataset: train.jsonl beside a red and a blue image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in (RED, BLUE):
        (folder / name).write_bytes(png(Path(name).stem, size))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text alone among rows of three images, so that processes differ in whether they show any."""
    text = [conversation_row(f"What is {number}?", f"It is {number}", images=()) for number in range(4)]
    question = "<image><image><image>Which is number {}?"
    shown = [conversation_row(question.format(number), "red and blue", images=(RED, BLUE, RED)) for number in range(4)]
    return write_messages(tmp_path_factory.mktemp("mixed"), [*text, *shown])


def conversation_row(question: str = "<image>Which color?", answer: str = "red", images: Any = (RED,)) -> Any:
    """A good row of messages, or with other arguments a bad one."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images)}


def run_process(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the repository and return its exit code and output."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT,
    )


def launch(config: str, *words: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a script with one of the shipped configurations."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml")
    return run_process(*launcher, "--num_processes", str(processes), *words, env={"OMP_NUM_THREADS": "1"})
