"""Engines that serve models: their processes, and the options that a model needs."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.serving.base import REQUIREMENTS, WORKERS, EngineAnswer, Prompt, Served, Size
from qwen_vl_sft.serving.environments import COMPLETE, environment_folder, python_of
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused
from qwen_vl_sft.serving.registry import ENGINES, engine_named

FAKE = replace(ENGINES["vllm"], name="fake", worker=str(REPOSITORY / "tests/fixtures/fake_engine.py"))
LORA = {"r": 12, "rank_pattern": {"a": 40}}


def prompt(number: int, text: str, images: int = 0) -> Prompt:
    return Prompt(number, [{"role": "user", "content": [{"type": "text", "text": text}]}], ["x.png"] * images)


def start(tmp_path: Path, *arguments: str) -> EngineProcess:
    return EngineProcess(FAKE, Path(sys.executable), Served(tmp_path, "float32"), arguments, tmp_path / "log")


def test_an_engine_answers_in_its_own_process(tmp_path):
    with start(tmp_path) as engine:
        assert engine.versions == {"fake": "1.2"}
        prompts = [prompt(7, "one two three", images=2), prompt(8, "four")]
        found = engine.answer(prompts, with_adapter=True, max_new_tokens=2, template_options={})
        assert found == [EngineAnswer(7, "one two with it", 2), EngineAnswer(8, "four with it", 0)]
        assert engine.answer(prompts[1:], False, 2, {}) == [EngineAnswer(8, "four", 0)]
    assert (tmp_path / "log").read_text() == f"loading {tmp_path}\n"


def test_what_an_engine_says_of_a_model_is_told_apart_from_its_end(tmp_path):
    with pytest.raises(EngineRefused, match=r"^ValueError: vLLM does not yet support DoRA\.$"):
        start(tmp_path, "refuse")
    with pytest.raises(EngineFailed, match=r"ended with exit code 3: out of memory \(all of it: .*log\)"):
        start(tmp_path, "die")


def test_vllm_is_given_the_options_that_a_model_needs():
    engine = engine_named("vllm")
    merged = Served(Path("merged"), "bfloat16")
    assert engine.arguments(merged) == ["--generation-config", "vllm"]
    adapted = Served(Path("base"), "float32", Path("run"), LORA, limits={"longest_edge": 50176})
    lora = ["--generation-config", "vllm", "--enable-lora", "--max-lora-rank", "64"]
    pixels = ["--mm-processor-kwargs", json.dumps({"size": {"longest_edge": 50176}})]
    assert engine.arguments(adapted) == [*lora, *pixels]
    vision = replace(adapted, changes_vision=True)
    assert engine.arguments(vision) == [*lora, "--enable-tower-connector-lora", *pixels]
    options = engine.check_arguments(adapted, Size(tokens=300, images=2))
    assert options[options.index("--max-model-len") + 1] == "512"
    assert json.loads(options[options.index("--limit-mm-per-prompt") + 1]) == {"image": 2, "video": 0}


@pytest.mark.parametrize(
    ("config", "why"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"), ({}, None)],
)
def test_vllm_refuses_some_adapters(config, why):
    said = engine_named("vllm").refuses(Served(Path("base"), "float32", Path("run"), LORA | config))
    assert (said is None) if why is None else (why in said)


def test_an_unknown_engine_names_the_known_ones():
    with pytest.raises(UserError, match=r"--engine: 'vlm' is none of vllm"):
        engine_named("vlm")


def test_an_environment_is_made_first_and_again_for_other_requirements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = ENGINES["vllm"]
    with pytest.raises(UserError, match=r"vLLM is not installed in .*; make its environment with .* --engine vllm$"):
        python_of(engine)
    folder = environment_folder(engine)
    folder.mkdir(parents=True)
    (folder / COMPLETE).touch()
    assert python_of(engine) == folder / "bin/python"
    (tmp_path / "other.txt").write_text("vllm==1\n")
    assert environment_folder(replace(engine, requirements=str(tmp_path / "other.txt"))) != folder


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_a_worker_imports_nothing_of_this_package_and_every_package_is_pinned(engine):
    tree = ast.parse((WORKERS / engine.worker).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in imported if "qwen_vl_sft" in ast.unparse(node)]
    lines = (REQUIREMENTS / engine.requirements).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert all("==" in line for line in packages)
