"""Plans of runs: dimensions, memory, time, rows, changes, and the script that prints them."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import statistics
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen3_5Config

from fixtures.models import FAMILIES, newer
from fixtures.repository import REPOSITORY
from qwen_vl_sft import tiny
from qwen_vl_sft.config.reading import key_hints
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.data.row_lengths import RowLengths
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.base import PackedLayout
from qwen_vl_sft.families.experts import Experts
from qwen_vl_sft.families.qwen3_5 import FAMILY
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.families.released import RELEASED, released_config
from qwen_vl_sft.families.shape import Passes, Work, training_flops
from qwen_vl_sft.families.shape_reading import read_shape
from qwen_vl_sft.modeling import experts, token_routes
from qwen_vl_sft.modeling.attention import use_segmented_vision_attention
from qwen_vl_sft.modeling.experts import use_grouped_lora
from qwen_vl_sft.modeling.kernels import use_fused_kernels
from qwen_vl_sft.planning import find_rows
from qwen_vl_sft.planning.advice import _faster, changes
from qwen_vl_sft.planning.cards import CARDS, card_of_device, find_card
from qwen_vl_sft.planning.check import compare_all, format_table
from qwen_vl_sft.planning.inputs import Launch, find_shape, read_launch
from qwen_vl_sft.planning.layer_memory import (
    attention_bytes,
    delta_bytes,
    experts_bytes,
    language_bytes,
    mlp_bytes,
    vision_block_bytes,
)
from qwen_vl_sft.planning.memory import BatchSizes, keep_as_many, memory_of
from qwen_vl_sft.planning.options import PlanOptions, plan_of, plot_file
from qwen_vl_sft.planning.report import as_json, describe, verdict
from qwen_vl_sft.planning.rows import measured_sizes
from qwen_vl_sft.planning.run import KERNELS_OF_AUTO, RunPlan
from qwen_vl_sft.planning.table import plan_table
from qwen_vl_sft.planning.training_setup import Training, layers_named

SEVEN = "Qwen/Qwen2-VL-7B-Instruct"
BATCH = BatchSizes(8192, 60, 26000)


def training(**changed):
    shape = read_shape(RELEASED[SEVEN])
    adapted = layers_named(shape, ["q_proj", "v_proj"], ())
    return replace(Training(shape, bits=4, adapted=adapted, rank=8), **changed)


def plan(*words, **keys):
    given = {name: [str(value).lower() if isinstance(value, bool) else str(value)] for name, value in keys.items()}
    options = {"recipe": REPOSITORY / "recipes/chartqa_qlora.yaml", "recipe_keys": given}
    return plan_of(PlanOptions(**options, **dict(words)))


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_flops_are_those_of_the_model(name):
    from transformers import AutoConfig

    from qwen_vl_sft.modeling.base_model import count_parameters
    from qwen_vl_sft.modeling.flops import BatchStats, FlopCounter

    if name == "qwen2_vl":
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny.MODEL_DIR))
    else:
        model = newer(name)
    shape = read_shape(model.config.to_dict())
    assert shape.shared_openings == family_of(model.config).shared_openings
    assert shape.parameters == {part: count.total for part, count in count_parameters(model).items()}

    stats = BatchStats(tokens=900, tokens_squared=450_000, target_tokens=9, patches=3000, patches_squared=4_000_000)
    work = Work(900, 450_000, 9, 3000, 4_000_000)
    for packed in (False, True):
        counter = FlopCounter.of(model.config, True, {"language"}, packed)
        assert training_flops(shape, work, Passes(2, 1, 1), packed).total == pytest.approx(counter.flops(stats))
        counter = FlopCounter.of(model.config, False, {"vision", "merger", "language"}, packed)
        assert training_flops(shape, work, Passes(3, 3, 3), packed).total == pytest.approx(counter.flops(stats))


def test_released_models_have_the_sizes_that_their_makers_tell():
    """From the index files of their weights, `total_size` in two bytes each."""
    known = {
        "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
        "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
        "Qwen/Qwen2-VL-72B-Instruct": 73_405_560_320,
        "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
        "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    }
    assert {name: sum(read_shape(RELEASED[name]).parameters.values()) for name in known} == known


@pytest.mark.parametrize(
    ("recipe", "nf4", "half"), [("qwen3_vl_moe_qlora", 15.8, 57.9), ("qwen3_5_moe_qlora", 18.3, 65.4)]
)
def test_weights_of_experts_are_those_of_the_recipes(recipe, nf4, half):
    """As their comments tell, which were counted on a model made of empty tensors."""
    path = REPOSITORY / f"recipes/{recipe}.yaml"
    plans = [plan_of(PlanOptions(recipe=path, recipe_keys={"load_in_4bit": [word]})) for word in ("true", "false")]
    sizes = [found.memory.weights / 2**30 for found in plans]
    assert sizes == [pytest.approx(nf4, abs=0.06), pytest.approx(half, abs=0.06)]
    assert f"{nf4} GiB of weights ({half} GiB in 16 bits)" in path.read_text()
    assert plans[0].step.seconds == pytest.approx(plans[1].step.seconds, rel=0.4)
    assert max(map(len, describe(plans[0]).splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_models_are_made_in_the_shape_of_released_ones(name):
    values = released_config(name)
    made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    assert read_shape(made.to_dict()) == read_shape(RELEASED[name])
    rope = made.text_config.rope_parameters
    width = read_shape(RELEASED[name]).text.head_width * rope.get("partial_rotary_factor", 1)
    assert 2 * sum(rope["mrope_section"]) == width


# Fields and values of published files that transformers' own configurations do not write, or write otherwise.
PUBLISHED = {
    "Qwen/Qwen3.8-27B": {
        "language_model_only": False,
        "text_config": {
            "model_type": "qwen3_5_text",
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "full_attention_interval": 4,
            "mamba_ssm_dtype": "float32",
            "mlp_only_layers": [],
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "output_gate_type": "swish",
            "partial_rotary_factor": 0.25,
        },
        "vision_config": {"deepstack_visual_indexes": [], "model_type": "qwen3_5"},
    },
    "Qwen/Qwen3-VL-30B-A3B-Instruct": {
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "rope_parameters": None,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
        },
        "vision_config": {"model_type": "qwen3_vl_moe"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_are_read_as_they_are_published(name, tmp_path):
    values, published = released_config(name), PUBLISHED[name]
    for part in ("text_config", "vision_config"):
        values[part] = {key: value for key, value in {**values[part], **published[part]}.items() if value is not None}
    values |= {key: value for key, value in published.items() if not key.endswith("_config")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    made = transformers.AutoConfig.from_pretrained(tmp_path)
    assert find_shape(str(tmp_path)) == read_shape(made.to_dict()) == read_shape(RELEASED[name])
    rope = made.text_config.rope_parameters
    assert rope == {"rope_type": "default", **released_config(name)["text_config"]["rope_parameters"]}
    assert family_of(made) is family_of(transformers.AutoConfig.for_model(values["model_type"]))


def test_the_recipe_of_a_hybrid_tells_the_memory_that_is_planned():
    path = REPOSITORY / "recipes/qwen3_5_qlora.yaml"
    found = plan_of(PlanOptions(recipe=path))
    assert found.memory.weights / 2**30 == pytest.approx(3.5 + 3.8, abs=0.06)
    assert found.memory.adapters + found.memory.gradients + found.memory.optimizer == pytest.approx(
        0.7 * 2**30, rel=0.1
    )
    assert "3.5 GiB of weights in NF4, 3.8 GiB in 16 bits" in path.read_text()


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match="is a llama model; the plan knows qwen2_vl"):
        read_shape({"model_type": "llama"}, "model")
    with pytest.raises(UserError, match="hidden_size"):
        read_shape({"model_type": "qwen2_vl"}, "model")


def test_plans_agree_with_what_was_measured():
    compared = compare_all(REPOSITORY / "benchmarks/plan.json")
    assert len(compared) >= 14
    assert max(abs(entry.memory_off) for entry in compared) < 0.1
    assert max(abs(entry.time_off) for entry in compared if entry.time_off is not None) < 0.2


def test_plans_agree_with_runs_that_they_were_not_fitted_to():
    """Of the settled ones the fit saw every other one."""
    alike, settled, first = (
        compare_all(REPOSITORY / f"benchmarks/{name}_h200.json")
        for name in ("plan_alike", "plan_settled", "plan_first_steps")
    )
    assert (len(alike), len(settled), len(first)) == (12, 6, 26)
    assert max(abs(entry.memory_off) for entry in alike + settled + first) < 0.04
    assert max(abs(entry.time_off) for entry in alike + settled) < 0.2


def test_the_largest_measured_runs_stand_in_the_file_as_they_were_measured():
    stored = json.loads((REPOSITORY / "benchmarks/plan.json").read_text())
    seven = json.loads((REPOSITORY / "benchmarks/step_qwen2_vl_7b_h200.json").read_text())
    known = {result["peak_memory_gib"] for run in seven["runs"] for result in run.get("results", ())}
    points = [point for point in stored["points"] if point["source"] == "step_qwen2_vl_7b_h200.json"]
    assert sum(point["gib"] in known for point in points) == len(points) - 2  # these two stand in the documentation


def test_the_table_of_the_documentation_is_current():
    page = (REPOSITORY / "docs/planning.md").read_text()
    assert plan_table() in page
    for name in ("plan", "plan_alike_h200", "plan_settled_h200", "plan_first_steps_h200"):
        assert format_table(compare_all(REPOSITORY / f"benchmarks/{name}.json")) in page


def test_lora_parameters_are_those_of_the_recipe():
    assert training().adapter_weights == 2_523_136
    shape = read_shape(RELEASED[SEVEN])
    assert len(layers_named(shape, None, ("language",))) == 7
    assert [linear.part for linear in layers_named(shape, ["qkv"], ())] == ["vision"]
    assert not layers_named(shape, ["proj_q"], ())


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("adapted", [None, ()])
def test_memory_falls_with_checkpointing_and_grows_with_tokens(strategy, adapted):
    some = training(strategy=strategy, processes=1 if strategy == "single" else 4)
    if adapted is None:
        some = replace(some, adapted=None, bits=16)
    totals = [memory_of(some, BATCH, count).total for count in range(some.blocks + 1)]
    # The first layer of the language model that is checkpointed needs room to be computed again.
    assert sum(after > before for before, after in pairwise(totals)) <= 1
    assert totals[-1] < 0.7 * totals[0]
    assert memory_of(some, BatchSizes(4096, 30, 13000), 0).total < totals[0]
    kept = keep_as_many(some, BATCH, totals[-1] + (totals[2] - totals[-1]) / 2)
    assert 2 < kept < some.blocks
    assert keep_as_many(some, BATCH, 0) == some.blocks


def test_what_shards_takes_less_on_more_gpus():
    full = training(adapted=None, bits=16)
    sizes = {
        strategy: memory_of(replace(full, strategy=strategy, processes=8), BATCH, 60).total
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    }
    assert sizes["ddp"] > sizes["zero1"] > sizes["zero2"] > sizes["zero3"]
    assert sizes["fsdp2"] < sizes["zero2"]
    split = memory_of(replace(full, strategy="zero2", processes=8), BATCH, 60)
    assert split.gradients == full.trained_weights * 4 / 8
    assert split.optimizer == full.trained_weights * 12 / 8


def test_parts_of_the_memory_by_hand():
    split = memory_of(training(), BATCH, 28)
    linear = 28 * (3584 * (3584 + 1024) + 3584 * 3584 + 3 * 3584 * 18944)
    linear += 32 * 12 * 1280**2 + 5120 * 5120 + 5120 * 3584
    others = 8_291_375_616 - linear
    assert split.weights == pytest.approx(linear * (0.5 + 1 / 64 + 4 / 16384) + others * 2)
    assert split.adapters == split.gradients == 2_523_136 * 4
    assert split.optimizer == 2_523_136 * 8
    assert split.buffers == 0
    assert memory_of(training(nested=False), BATCH, 28).weights > split.weights
    assert memory_of(training(bits=16), BATCH, 28).weights == 8_291_375_616 * 2


def test_kernels_dropout_and_cached_features_change_activations():
    kernels = frozenset({"rms_norm", "swiglu"})
    fused = memory_of(training(kernels=kernels), BATCH, 0)
    assert memory_of(training(), BATCH, 0).activations > 1.3 * fused.activations
    assert memory_of(training(kernels=kernels, dropout=True), BATCH, 0).activations > fused.activations
    assert memory_of(training(cached_features=True), BATCH, 0).vision == 0
    assert memory_of(training(packing=False), BATCH, 0).activations > memory_of(training(), BATCH, 0).activations


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA H100 PCIe", 79, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA L40S", 44, "l40s"),
        ("NVIDIA L40", 44, "l40"),
        ("NVIDIA GB200", 180, "gb200"),
        ("AMD Instinct MI300X", 192, "mi300x"),
    ],
)
def test_cards_by_the_name_of_a_device(name, gib, key):
    assert card_of_device(name, gib * 2**30) == CARDS[key]
    assert card_of_device("NVIDIA GeForce GTX 1080") is None


def test_every_shipped_recipe_is_planned_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipes = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert len(recipes) > 5
    for path in recipes:
        found = plan_of(PlanOptions(recipe=path))
        assert max(map(len, describe(found).splitlines())) <= 80
    found = plan_of(PlanOptions(recipe=REPOSITORY / "recipes/qwen3_5_qlora.yaml"))
    # As its comments tell.
    assert found.memory.weights / 2**30 == pytest.approx(3.5 + 3.8, abs=0.1)
    assert (found.memory.adapters + found.memory.gradients + found.memory.optimizer) / 2**30 == pytest.approx(
        0.7, abs=0.1
    )


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub():
    for name in ("./nope", "../nope", "/nope/x", "~/nope"):
        with pytest.raises(UserError, match="no name on the Hub"):
            find_shape(name)


def test_cards_by_name():
    with pytest.raises(UserError, match="has less memory than CUDA takes"):
        find_card("0.5GB:10TFLOPS")
    assert find_card("H200") == CARDS["h200"]
    assert find_card("NVIDIA GeForce RTX 4090") == CARDS["rtx4090"]
    assert find_card("4090") == CARDS["rtx4090"]
    other = find_card("48GB:181TFLOPS")
    assert other.memory == 48 * 2**30
    assert other.flops == 181e12
    with pytest.raises(UserError, match="did you mean h100"):
        find_card("h10")


def test_no_key_of_a_recipe_is_taken_for_a_mistyped_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name}: []\n" for name in key_hints() if name.startswith(("lr", "eval", "log", "save"))))
    with pytest.raises(UserError) as refused:
        plan_of(PlanOptions(recipe=path))
    assert "save_total_limit: [] is not a whole number" in str(refused.value)
    assert "unknown" not in str(refused.value)


def test_mistyped_foreign_and_wrong_keys_are_refused_at_once(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tokens_per_bach: 4096\ndeepspeed: x\nlora_r: many\nlearning_rate: 1e-4\n")
    with pytest.raises(UserError) as refused:
        plan_of(PlanOptions(recipe=path, recipe_keys={"packing": ["perhaps"]}))
    problems = "\n".join(refused.value.problems)
    assert "did you mean tokens_per_batch?" in problems
    assert "deepspeed cannot be set" in problems
    assert "lora_r: 'many' is not a whole number" in problems
    assert "packing: 'perhaps'" in problems
    assert len(refused.value.problems) == 4


def test_launch_files():
    assert read_launch(None, None) == Launch("single", 1)
    assert read_launch(None, 4) == Launch("ddp", 4)
    for name in ("zero1", "zero2", "zero3", "fsdp2", "ddp"):
        assert read_launch(name, 8) == Launch(name, 8)
    assert read_launch("single_gpu", None) == Launch("single", 1)
    with pytest.raises(UserError, match="config_file: nowhere does not exist"):
        read_launch("nowhere", None)


def test_dimensions_are_found_without_a_network(tmp_path, monkeypatch):
    commit = tmp_path / "hub/hub/models--me--mine"
    (commit / "refs").mkdir(parents=True)
    (commit / "refs/main").write_text("abc\n")
    (commit / "snapshots/abc").mkdir(parents=True)
    (commit / "snapshots/abc/config.json").write_text(json.dumps(RELEASED[SEVEN]))
    assert find_shape("me/mine") == find_shape(SEVEN)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no folder with a"):
        find_shape("no such: name")
    shape = find_shape(str(tiny.MODEL_DIR))
    assert sum(shape.parameters.values()) < 2e6


def test_dimensions_are_fetched_from_the_hub(monkeypatch):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if "mine" in self.path else 404)
            self.end_headers()
            self.wfile.write(json.dumps(RELEASED[SEVEN]).encode())

        def log_message(self, *args):
            """Say nothing."""

    monkeypatch.setenv("HF_TOKEN", "hf_token")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        find_shape("me/mine")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("qwen_vl_sft.planning.inputs._SECONDS", 60)
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert find_shape("me/mine", "a/b") == find_shape(SEVEN)
            with pytest.raises(UserError, match="cannot be fetched: HTTP Error 404") as refused:
                find_shape("me/other")
        finally:
            server.shutdown()
            thread.join()
    assert asked[0] == ("/me/mine/resolve/a%2Fb/config.json", "Bearer hf_token")
    assert "hf_token" not in str(refused.value)


def test_rows_of_jsonl_are_sampled(tmp_path):
    Image.new("RGB", (280, 560)).save(tmp_path / "a.png")
    Image.new("RGB", (28, 28)).save(tmp_path / "b.png")
    lines = []
    for number in range(10):
        turns = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y" * 20}]
        lines.append(json.dumps({"messages": turns, "images": ["a.png" if number < 8 else "b.png"]}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    vision = find_shape(SEVEN).vision
    found = find_rows.sample(DataSettings(dataset_name=str(tmp_path)), vision)
    assert found.rows == 10
    # 10 x 20 merged tokens of 4 patches, and the smallest image of 2 x 2 of them.
    assert found.patches == (8 * 800 + 2 * 16) / 10
    assert found.target_tokens == 1 + 20 / 4
    assert found.images == 1
    assert found.distinct_images == 0.2
    assert found.computed == pytest.approx(1 - (7 * 200 + 4) / 2078)
    assert (found.groups, found.opening) == (0.2, 0)
    behind = find_rows.sample(DataSettings(dataset_name=str(tmp_path), system_message="x" * 80), vision)
    assert (behind.opening, behind.tokens) == (20, found.tokens + 20)
    sliced = find_rows.sample(DataSettings(dataset_name=str(tmp_path), dataset_train_split="train[:50%]"), vision)
    assert sliced.rows == 5


def test_rows_of_parquet_are_sampled():
    vision = find_shape(SEVEN).vision
    found = find_rows.sample(DataSettings(dataset_name=str(tiny.DATA_DIR)), vision)
    assert found.source == f"estimated from 200 of {found.rows} rows"
    assert found.images == 1
    assert 0 < found.patches < 1000


def test_sizes_of_images_are_the_processors():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    random = np.random.default_rng(0)
    for width, height in random.integers(8, 4000, (50, 2)).tolist():
        if max(width, height) / min(width, height) > 100:
            continue
        for least, most in ((3136, 12845056), (200704, 1003520)):
            high, wide = smart_resize(height, width, 28, least, most)
            assert find_rows.patches_of(width, height, 28, least, most) == high * wide // 784


def test_unreadable_data_is_assumed_and_says_so(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": "gone.png", "query": "?", "label": "1"}\n')
    found = find_rows.row_sizes(DataSettings(dataset_name=str(tmp_path)), SEVEN, find_shape(SEVEN).vision)
    assert found.source.startswith("assumed")
    part = find_rows.row_sizes(DataSettings(dataset_train_split="train[:10%]"), SEVEN, find_shape(SEVEN).vision)
    assert part.rows == 2830


def test_what_a_check_measured_is_used_until_the_data_changes(tmp_path):
    data = DataSettings(dataset_name=str(tmp_path))
    (tmp_path / "train.jsonl").write_text("{}\n")
    ones = np.ones(4, dtype=np.int64)
    lengths = RowLengths(
        tokens=np.array([100, 100, 200, 50]),
        target_tokens=3 * ones,
        images=np.array([1, 1, 2, 0]),
        patches=np.array([320, 320, 640, 0]),
        prefix=np.array([0, 0, 1, -1]),
        prefix_tokens=np.array([80, 80, 160, 0]),
        prefix_patches=np.array([320, 320, 640, 0]),
    )
    found = measured_sizes(lengths)
    assert (found.rows, found.tokens, found.longest, found.images) == (4, 112.5, 200, 1)
    assert found.computed == 1 - 80 / 450
    assert (found.groups, found.opening) == (3 / 4, 0)
    assert measured_sizes(replace(lengths, opening_tokens=20)).opening == 20
    assert found.patches_squared == (320**2 * 2 + 640**2 / 2) / 4
    find_rows.remember_sizes(data, SEVEN, found)
    kept = find_rows.row_sizes(data, SEVEN, find_shape(SEVEN).vision)
    assert replace(kept, source=found.source) == found
    assert find_rows.remembered_sizes(data, "another model") is None
    (tmp_path / "train.jsonl").write_text("{}\n{}\n")
    assert find_rows.remembered_sizes(data, SEVEN) is None


def test_stated_rows_win():
    found = plan(("rows", 1000), ("row_tokens", 400), ("image_tokens", 300)).rows
    assert found.source == "as --rows, --image_tokens and --row_tokens say"
    assert plan(("rows", 1000)).rows.source == "assumed: charts as in ChartQA, 685 tokens a row; --rows"
    # Of 625 rows of ChartQA, a Qwen3-VL reads 548.5 tokens each on average and a Qwen2-VL 683.8.
    larger = plan(model_name_or_path="Qwen/Qwen3-VL-8B-Instruct").rows
    assert (larger.tokens, larger.patches) == (554, pytest.approx(1697, rel=0.02))
    assert (found.rows, found.tokens, found.patches) == (1000, 400, 1200)
    with pytest.raises(UserError, match="a row's images alone"):
        plan(("row_tokens", 100))


def test_the_tutorial_fits_on_its_card():
    found = plan(("gpu", "a100-80"), packing=False, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert found.fits
    assert found.steps == 3 * 89
    assert found.rows_per_step == 32
    assert found.micro_batches == 8
    assert "all of 28 checkpointed" in verdict(found)


@pytest.mark.parametrize(
    "words", [{}, {"use_peft": False, "load_in_4bit": False}, {"packing": False, "gradient_checkpointing": False}]
)
@pytest.mark.parametrize("gpu", ["t4", "rtx4090", "h200", "48GB:181TFLOPS"])
def test_every_plan_is_told_in_80_columns(gpu, words):
    found = plan(("gpu", gpu), **words)
    text = describe(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert json.loads(json.dumps(as_json(found)))["fits"] == found.fits
    for change in changes(found):
        assert change.plan.fits
        assert not found.fits or change.plan.hours < found.hours


def test_a_plan_over_machines_says_that_their_network_is_not_counted():
    for count, told in ((8, False), (16, True)):
        text = " ".join(describe(plan(("num_gpus", count), ("config_file", "fsdp2"))).split())
        assert (f"{count} GPUs are taken to be linked as those of one machine" in text) is told


def test_a_plot_is_a_picture_in_a_folder_that_exists(tmp_path):
    assert plot_file(str(tmp_path / "memory.svg")) == tmp_path / "memory.svg"
    for path, why in (
        (tmp_path, "ends with .png"),
        (tmp_path / "x.txt", "ends with .png"),
        (tmp_path / "no/x.png", "make"),
    ):
        with pytest.raises(ValueError, match=why):
            plot_file(str(path))


def test_changes_make_a_plan_fit_or_faster():
    full = plan(("gpu", "a100-80"), use_peft=False, load_in_4bit=False)
    assert not full.fits
    texts = [change.text for change in changes(full)]
    assert len(texts) == 3
    assert any(text.startswith("use_peft: true") for text in texts)
    assert "max_pixels" not in " ".join(texts)
    slow = plan(packing=False, gradient_checkpointing=True, fused_kernels="null")
    assert changes(slow)[0].text == "packing: true, gradient_checkpointing: auto"
    several = plan(("gpu", "l40s"), ("num_gpus", 4), use_peft=False, load_in_4bit=False)
    assert not several.fits
    assert any("8 GPUs" in change.text for change in changes(several))


FULL = {"use_peft": False, "load_in_4bit": False}
PADDED = {"packing": False, "per_device_train_batch_size": 8, "gradient_checkpointing": False}


@pytest.mark.parametrize("gpu", ["t4", "rtx4090", "a100-80", "h200"])
@pytest.mark.parametrize(
    "launch", [{}, {"num_gpus": 4, "config_file": "zero3"}, {"num_gpus": 2, "config_file": "fsdp2"}], ids=str
)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        PADDED,
        {**PADDED, "global_batch_size": "null", "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": False, "lora_dropout": 0, "max_pixels": 500000},
        {"load_in_4bit": False, "tokens_per_batch": 32768, "gradient_checkpointing": True, "global_batch_size": 64},
        {**FULL, "freeze_vision_tower": True},
        {**FULL, "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", **PADDED},
        {"model_name_or_path": "Qwen/Qwen3-VL-32B-Instruct", "load_in_4bit": False, "load_in_fp8": True},
    ],
    ids=str,
)
def test_every_change_does_what_it_says_when_it_is_made(gpu, launch, keys):
    options = {"gpu": gpu, **launch}
    try:
        found = plan(*options.items(), **keys)
    except UserError:  # no FP8 on this card or launch
        assert keys.get("load_in_fp8")
        return
    for change in changes(found):
        words = re.match(r"(?:(\d+) GPUs with )?accelerate_configs/(\w+)\.yaml$", change.text)
        made = {"config_file": words[2]} if words else {}
        made |= {"num_gpus": int(words[1])} if words and words[1] else {}
        written = re.sub(r" \(.*?\)", "", change.text)
        stated = {} if words else dict(part.split(": ") for part in written.split(", "))
        after = plan(*(options | made).items(), **(keys | stated))
        assert after.fits
        assert after.memory.total == pytest.approx(change.plan.memory.total, rel=1e-3)
        assert after.hours == pytest.approx(change.plan.hours, rel=0.02)


def test_a_plan_refuses_what_training_refuses():
    """Batches, precision and quantization by the rules of training; keys without effect are passed over."""
    with pytest.raises(UserError, match="global_batch_size 32 is below the 64 processes"):
        plan(("num_gpus", 64))
    with pytest.raises(UserError, match="share_prefixes with lora_dropout"):
        plan(share_prefixes=True)
    with pytest.raises(UserError, match="not a multiple of per_device_train_batch_size 4 x 3"):
        plan(("num_gpus", 3), packing=False)
    with pytest.raises(UserError, match="lora_r: 0 must be at least 1"):
        plan(lora_r=0)
    with pytest.raises(UserError, match="quantized weights cannot be trained"):
        plan(use_peft=False)
    assert plan(use_peft=False, load_in_4bit=False).training.full


def test_assumed_rows_have_the_limits_of_the_recipe():
    least, plain, most = plan(min_pixels=800_000), plan(), plan(max_pixels=200_704)
    assert most.rows.patches == pytest.approx(1024)
    assert least.rows.tokens > plain.rows.tokens > most.rows.tokens
    assert most.rows.computed > plain.rows.computed
    assert plan(max_pixels=2_000_000).rows == plain.rows


def test_the_largest_micro_batch_that_fits_fits():
    found = plan(("gpu", "rtx4090"))
    for count in (0, found.training.blocks):
        tokens = found.fitting_tokens(count)
        share = found.largest()
        batch = BatchSizes(tokens, tokens * share.target_tokens / share.tokens, tokens * share.patches / share.tokens)
        assert memory_of(found.training, batch, count).total <= found.room
        more = BatchSizes(tokens + 512, batch.target_tokens, batch.patches)
        assert memory_of(found.training, more, count).total > found.room - 2**26


def test_what_is_written():
    found = plan(num_train_epochs=1, save_steps=10, save_total_limit=2)
    disk = found.disk()
    assert disk["checkpoint"] == 2_523_136 * 12
    assert disk["checkpoints"] == 2 * disk["checkpoint"]
    assert disk["features"] == 0
    cached = plan(cache_image_features="bfloat16").disk()["features"]
    assert cached == pytest.approx(2830 * 0.6 * 2237 / 4 * 3584 * 2)
    assert plan(save_strategy="no").disk()["checkpoints"] == 0


def test_a_base_in_fp8_takes_a_byte_a_weight_and_less_time_where_the_card_has_fp8():
    nf4, fp8, gradients, plain = (
        plan(**{"load_in_4bit": False, "gradient_checkpointing": False, **keys})
        for keys in ({"load_in_4bit": True}, {"load_in_fp8": True}, {"fp8_gradients": True}, {})
    )
    assert nf4.memory.weights < fp8.memory.weights < 0.65 * plain.memory.weights
    assert fp8.step.seconds < 0.85 * plain.step.seconds
    assert gradients.memory == plain.memory
    assert fp8.step.seconds < gradients.step.seconds < 0.95 * plain.step.seconds
    assert {"fp8_gradients: true", "load_in_fp8: true"} <= {change.text for change in _faster(plain)}
    assert "load_in_fp8: true, fp8_gradients: false" in {change.text for change in _faster(gradients)}
    with pytest.raises(UserError, match="fp8_gradients: A100 80 GB has no products in FP8"):
        plan(("gpu", "a100-80"), load_in_4bit=False, fp8_gradients=True)
    with pytest.raises(UserError, match="A100 80 GB has no products in FP8; use load_in_4bit"):
        plan(("gpu", "a100-80"), load_in_4bit=False, load_in_fp8=True)
    with pytest.raises(UserError, match="DeepSpeed cannot split FP8 weights"):
        plan(("num_gpus", 2), ("config_file", "zero3"), load_in_4bit=False, load_in_fp8=True)


def test_what_the_package_refuses_of_experts_is_not_planned():
    sparse = {"model_name_or_path": "Qwen/Qwen3-VL-30B-A3B-Instruct", "load_in_4bit": False}
    with pytest.raises(UserError, match="load_in_8bit does not reach experts"):
        plan(**sparse, load_in_8bit=True)
    fp8, half = plan(**sparse, load_in_fp8=True), plan(**sparse)
    assert 0.5 * half.memory.weights < fp8.memory.weights < 0.55 * half.memory.weights
    assert 0.7 * half.step.seconds < fp8.step.seconds < 1.05 * half.step.seconds
    with pytest.raises(UserError, match="this model has none; use language"):
        plan(lora_scope="experts", lora_target_modules="null")


def test_adapters_on_experts_take_what_the_recipes_tell():
    """With gradients and Adam's moments, in float32: 9.6 GiB at rank 16, as its comment says."""
    recipe = REPOSITORY / "recipes/qwen3_vl_moe_qlora.yaml"
    every, some = (
        plan_of(PlanOptions(recipe=recipe, recipe_keys={"lora_scope": [scope], **keys}))
        for scope, keys in (("experts", {}), ("language", {"train_router": ["true"]}))
    )
    assert every.training.trained_weights * 16 / 2**30 == pytest.approx(9.6, abs=0.06)
    assert every.memory.total > some.memory.total
    assert some.training.trained_weights - some.training.adapter_weights == 48 * 128 * 2048
    assert not {change.text for change in changes(some)} & {"load_in_fp8: true, without load_in_4bit"}


def test_adapters_on_a_base_in_fp8_keep_no_input_that_can_be_made_again():
    found = plan(
        load_in_4bit=False, load_in_fp8=True, lora_dropout=0.0, lora_target_modules="null", lora_scope="language"
    )
    in_fp8, text = found.training, found.training.shape.text
    plain = replace(in_fp8, fp8=False, bits=16)
    assert attention_bytes(plain) - attention_bytes(in_fp8) == 2 * text.hidden
    assert mlp_bytes(plain) - mlp_bytes(in_fp8) == 2 * (text.hidden + text.mlp)


def test_eight_bits_are_not_sharded():
    with pytest.raises(UserError, match="8-bit weights cannot be sharded"):
        plan(("num_gpus", 2), ("config_file", "fsdp2"), load_in_4bit=False, load_in_8bit=True)


def test_a_plan_imports_no_training_library():
    """It has to answer at once. Each module that it imports, and what that imports of this package, is read."""
    heavy = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes", "numpy"}
    waiting, seen, found = [REPOSITORY / "scripts/plan.py"], set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {f"{path.name}: {name}" for name in names if name.split(".")[0] in heavy}
            for name in names:
                if name.split(".")[0] == "qwen_vl_sft":
                    place = REPOSITORY / "src" / Path(*name.split("."))
                    waiting += [place.with_suffix(".py"), place / "__init__.py"]
    assert len(seen) > 15
    assert not found


def test_a_shape_that_is_read_by_the_script_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_shape(str(tmp_path))


def test_sharing_computes_fewer_tokens():
    shared, alone = plan(share_prefixes=True, lora_dropout=0), plan()
    # 32 rows a step on 19.2 charts come to two micro-batches, with an opening of 98 tokens each.
    assert shared.micro_batches == 2
    assert shared.computed_share == pytest.approx(0.62 - (0.6 * 32 - 2) * 98 / (32 * shared.rows.tokens))
    assert shared.work.patches == pytest.approx(0.62 * alone.work.patches)
    assert shared.work.tokens_squared < 0.62 * alone.work.tokens_squared
    apart = replace(shared, rows=replace(shared.rows, opening=0))
    assert apart.computed_share == 0.62
    assert apart.hours > shared.hours
    assert shared.hours < alone.hours
    assert isinstance(shared, RunPlan)


@contextlib.contextmanager
def kept_by_autograd(model):
    """Collect size and tensor of each storage that autograd keeps for the backward, the model's own weights aside."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("name", ["Qwen2VLConfig", "Qwen2_5_VLConfig", "Qwen3VLConfig"])
@pytest.mark.parametrize("lora", [["q_proj", "v_proj"], "all-linear", None], ids=["some", "all", "full"])
def test_a_layer_keeps_what_is_planned(name, lora):
    """Autograd's own count of what a layer keeps: PyTorch's operations, in bfloat16 by autocast."""
    tokens, sums, shape = 256, {}, None
    for layers in (1, 2):
        model = language_model(name, layers, lora)
        shape = read_shape(model.config.to_dict())
        base = model if lora is None else model.get_base_model()
        dtype = torch.float32 if lora is None else torch.bfloat16
        embedded = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), kept_by_autograd(model) as kept:
            base.model.language_model(inputs_embeds=embedded, use_cache=False)
            sums[layers] = sum(size for size, _ in kept.values())
    full = lora is None
    adapted = None if full else layers_named(shape, lora if isinstance(lora, list) else None, ("language",))
    planned = Training(shape, bits=32 if full else 16, stored=4 if full else 2, adapted=adapted, rank=8)
    copies = sum(linear.inputs * linear.outputs for linear in shape.linears if linear.part == "language")
    copies = 2 * (copies if full else planned.adapter_weights / shape.text.layers)
    assert (sums[2] - sums[1] - copies) / tokens == pytest.approx(language_bytes(planned), rel=0.002)


@pytest.mark.parametrize("name", ["Qwen3VLMoeConfig", "Qwen3_5MoeConfig"])
@pytest.mark.parametrize(
    "lora", [["q_proj", "v_proj"], "all-linear", "experts", None], ids=["some", "all", "experts", "full"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_with_experts_keeps_what_is_planned(fused, name, lora, monkeypatch):
    """Autograd's own count, as above; routers are frozen. What a kernel keeps PyTorch's operations in its place do too."""
    monkeypatch.setattr(experts, "_FUSED", token_routes.Plain())
    tokens, sums = 512, []
    for layers in (1, 2):
        model = language_model(name, layers, lora, layer_types=["full_attention"] * layers)
        base = model if lora is None else model.get_base_model()
        for router in Experts().routers(base).values():
            router.requires_grad_(False)
        assert use_fused_kernels(base, ["experts"] * fused) == ({"experts": layers} if fused else {})
        dtype = torch.float32 if lora is None else torch.bfloat16
        embedded = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), kept_by_autograd(model) as kept:
            base.model.language_model(inputs_embeds=embedded, use_cache=False)
        sums.append(sum(size for size, _ in kept.values()))
        shape = read_shape(base.config.to_dict())
    full = lora is None
    adapted = None if full else layers_named(shape, lora if isinstance(lora, list) else None, ("language",))
    planned = Training(shape, bits=32 if full else 16, stored=4 if full else 2, adapted=adapted, rank=8)
    planned = replace(planned, adapts_experts=lora == "experts", kernels=frozenset(["experts"] * fused))
    linears = sum(linear.weights for linear in shape.linears if linear.part == "language")
    copies = 2 * (linears if full else planned.adapter_weights) / shape.text.layers
    expected = attention_bytes(planned) + experts_bytes(planned)
    assert (sums[1] - sums[0] - copies) / tokens == pytest.approx(expected, rel=0.002)
    assert language_bytes(planned) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
@pytest.mark.parametrize("lora", [["q_proj", "v_proj"], "all-linear", None], ids=["some", "all", "full"])
def test_a_layer_of_a_hybrid_keeps_what_is_planned(kind, lora):
    """Autograd's own count, as above, of packed rows."""
    tokens, sums = 512, []
    for count in (1, 2):
        kinds = ["full_attention", *[kind] * count]
        model = language_model("Qwen3_5Config", len(kinds), lora, layer_types=kinds)
        base = model if lora is None else model.get_base_model()
        FAMILY.prepare_packing(base)
        layout = PackedLayout([tokens // 2] * 2, [None] * 2, torch.zeros(0).long())
        entries = FAMILY.packed_entries(base.config, layout)
        dtype = torch.float32 if lora is None else torch.bfloat16
        embedded = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), kept_by_autograd(model) as kept:
            base.model.language_model(inputs_embeds=embedded, use_cache=False, **entries)
        sums.append(sum(size for size, _ in kept.values()))
        shape = read_shape(base.config.to_dict())
    full, delta = lora is None, kind == "linear_attention"
    adapted = None if full else layers_named(shape, lora if isinstance(lora, list) else None, ("language",))
    planned = Training(shape, bits=32 if full else 16, stored=4 if full else 2, adapted=adapted, rank=8)
    names = ("linear_attn.", "mlp.") if delta else ("self_attn.", "mlp.")
    linears = [entry for entry in (shape.linears if full else adapted) if entry.part == "language"]
    linears = [entry for entry in linears if any(name in entry.name for name in names)]
    weights = [(entry.inputs * entry.outputs) if full else 8 * (entry.inputs + entry.outputs) for entry in linears]
    expected = (delta_bytes(planned) if delta else attention_bytes(planned)) + mlp_bytes(planned)
    if delta:
        # A chunk that begins a row multiplies no state with its queries and keys.
        expected -= 4 * shape.text.delta.heads * shape.text.delta.key_width * 2 * shape.text.delta.chunk / tokens
    assert (sums[1] - sums[0] - 2 * sum(weights)) / tokens == pytest.approx(expected, rel=0.002)


def test_kernels_of_linear_attention_keep_a_fraction(tmp_path):
    """Of the 9B's shape a fifth of what PyTorch's operations keep, at most."""
    Qwen3_5Config(vision_config={"out_hidden_size": 4096}).save_pretrained(tmp_path)
    fast, slow = (plan(model_name_or_path=tmp_path, fused_kernels=names) for names in ("[linear_attention]", "[lora]"))
    assert delta_bytes(fast.training) < delta_bytes(slow.training) / 5
    assert memory_of(fast.training, BATCH, 0).total < memory_of(slow.training, BATCH, 0).total
    assert "linear attention" not in describe(fast)


@pytest.mark.parametrize(
    ("name", "tokens", "shared"), [("packed", 8192, False), ("packed 16k", 16384, False), ("shared 16k", 16384, True)]
)
def test_plans_of_a_hybrid_agree_with_what_was_measured(name, tokens, shared):
    """Rows and memory of Qwen3.5-9B on an H200; the time that its kernels take was fitted to them."""
    file = REPOSITORY / "benchmarks/qwen3_5_9b_h200.json"
    rounds = [one[name] for one in json.loads(file.read_text())["rounds"]["rounds"]]
    keys = {"model_name_or_path": "Qwen/Qwen3.5-9B", "lora_target_modules": "null", "lora_scope": "language"}
    keys |= {"lora_r": 16, "lora_dropout": 0.0, "packing": True, "share_prefixes": shared, "tokens_per_batch": tokens}
    keys |= {"fused_kernels": list(KERNELS_OF_AUTO), "global_batch_size": 112, "gradient_checkpointing": False}
    planned = plan(**keys)
    speed = statistics.median(one["rows_per_second"] for one in rounds)
    assert planned.rows_per_step / planned.step.seconds == pytest.approx(speed, rel=0.15)
    most = max(one["peak_memory_gib"] for one in rounds)
    assert most < planned.memory.total / 2**30 < 1.05 * most


def test_a_hybrid_is_planned(tmp_path):
    assert read_shape(newer("Qwen3_5Config").config.to_dict()).unfit_kernels == set(FAMILY.unfit_kernels)
    newer("Qwen3_5Config").config.save_pretrained(tmp_path)
    found = plan(model_name_or_path=tmp_path)
    assert not found.training.kernels & set(FAMILY.unfit_kernels)
    told = " ".join(describe(found).split())
    assert "PyTorch's operations, which take longer" in told
    assert "pip install 'qwen_vl_sft[linear]'" in told
    assert "; more than " in verdict(found)
    memory = [memory_of(found.training, BATCH, count).total for count in (0, found.training.blocks)]
    assert memory[1] < memory[0]


@pytest.mark.parametrize("name", ["Qwen2VLConfig", "Qwen2_5_VLConfig", "Qwen3VLConfig"])
def test_a_block_of_a_tower_that_trains_keeps_what_is_planned(name):
    """In bfloat16 weights, as ZeRO computes: autocast makes norms float32 on a GPU alone."""
    patches, sums, shape = 256, {}, None
    for depth in (1, 2):
        model = language_model(name, 1, None, depth=depth, hidden_size=256, embed_dim=256, intermediate_size=1024)
        model = model.bfloat16()
        use_segmented_vision_attention(model)
        shape = read_shape(model.config.to_dict())
        pixels = torch.randn(patches, shape.vision.pixels).bfloat16()
        with kept_by_autograd(model) as kept:
            model.model.visual(pixels, torch.tensor([[1, 16, 16]]))
        sums[depth] = sum(size for size, _ in kept.values())
    planned = vision_block_bytes(Training(shape, adapted=None, strategy="zero2"))
    assert (sums[2] - sums[1]) / patches == pytest.approx(planned, rel=0.01)


def test_gradients_of_one_micro_batch_a_step_come_as_its_activations_go():
    """As measured: with all weights of a 2B and all layers checkpointed, 36.2 GiB and not 47."""
    shape = read_shape(RELEASED["Qwen/Qwen2-VL-2B-Instruct"])
    kernels = frozenset(KERNELS_OF_AUTO)
    alone = Training(shape, adapted=None, kernels=kernels, accumulates=False)
    largest = BatchSizes(11679, 68, 38680)
    assert memory_of(alone, largest, 60).total / 2**30 == pytest.approx(36.20, rel=0.02)
    assert memory_of(alone, largest, 0).total / 2**30 == pytest.approx(115.83, rel=0.02)
    every = replace(alone, accumulates=True)
    for checkpointed in (0, 28, 60):
        apart = memory_of(every, largest, checkpointed).total - memory_of(alone, largest, checkpointed).total
        assert 0 < apart <= memory_of(every, largest, checkpointed).gradients
    zero = replace(alone, strategy="zero2")  # DeepSpeed holds them all the time
    assert memory_of(zero, largest, 60) == memory_of(replace(zero, accumulates=True), largest, 60)
    steps_of_one = plan(**FULL, tokens_per_batch=32768)
    assert steps_of_one.memory.total < memory_of(steps_of_one.training, steps_of_one.largest(), 0).total


def language_model(name, layers, lora, layer_types=None, **vision_shape):
    """A model of a family whose language model has so many layers, with LoRA or all of its weights training."""
    text = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 256}
    if name == "Qwen2VLConfig":
        vision = {"depth": 1, "embed_dim": 64, "hidden_size": 256, "num_heads": 4}
    elif name in ("Qwen3VLConfig", "Qwen3VLMoeConfig"):
        text["head_dim"] = 64
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    elif name in ("Qwen3_5Config", "Qwen3_5MoeConfig"):
        text |= {"head_dim": 64, "layer_types": layer_types, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 32, "linear_value_head_dim": 16}
        rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        text["rope_parameters"] = {**rope, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
        vision["num_position_embeddings"] = 64
    if "Moe" in name:
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        text |= {"shared_expert_intermediate_size": 192}
    vision |= {key: value for key, value in vision_shape.items() if key in vision}
    config = getattr(transformers, name)(text_config=text, vision_config=vision)
    dtype = torch.float32 if lora is None else torch.bfloat16
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if lora is not None:
        names = lora if isinstance(lora, list) else r".*language_model.*(_proj(_qkv|_z|_a|_b)?|shared_expert_gate)"
        experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")] if lora == "experts" else None
        model = get_peft_model(model, LoraConfig(r=8, target_modules=names, target_parameters=experts))
        use_grouped_lora(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model.train()
