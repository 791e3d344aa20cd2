"""Families of models: what each says of itself, and that no other room asks which family a model is of."""

import ast
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from fixtures.models import newer
from fixtures.repository import REPOSITORY
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.base import PARTS, PackedLayout
from qwen_vl_sft.families.registry import FAMILIES, family_of
from qwen_vl_sft.families.shape_reading import read_shape
from qwen_vl_sft.modeling.base_model import load_config
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.modeling.kernels import KERNELS, LORA
from qwen_vl_sft.modeling.model_rules import problems_of_family

CONFIGS = [
    Qwen2VLConfig(),
    Qwen2_5_VLConfig(),
    Qwen3VLConfig(),
    Qwen3_5Config(),
    Qwen3VLMoeConfig(),
    Qwen3_5MoeConfig(),
]
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 4]])
# What only families/ may know, and what builds the tiny model.
MODEL_TYPES = {family.model_type for family in FAMILIES}
CLASSES = ("Qwen2VL", "Qwen2_5_VL", "Qwen2_5VL", "Qwen3VL", "Qwen3_5")
PROBES = (
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
    "deepstack_features",
    "linear_conv_kernel_dim",
    "moe_intermediate_size",
)


def test_each_family_is_found_by_its_configuration():
    assert [family_of(config) for config in CONFIGS] == list(FAMILIES)
    names = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3.5", "Qwen3-VL-MoE", "Qwen3.5-MoE"]
    assert [family.name for family in FAMILIES] == names


def test_another_model_is_refused_with_the_families_there_are():
    with pytest.raises(
        UserError, match=r"model_name_or_path: x is a gpt2 model; this package trains Qwen2-VL, .*Qwen3"
    ):
        family_of(SimpleNamespace(model_type="gpt2"), "model_name_or_path: x")


def test_a_model_that_cannot_be_trained_is_refused_with_the_reason_by_plans_too():
    why = (
        r"^x is a qwen4_exp model, which is not trained: its indexer .* needs a way of transformers to train it first; "
    )
    with pytest.raises(UserError, match=why + "this package trains Qwen2-VL"):
        family_of(SimpleNamespace(model_type="qwen4_exp"), "x")
    with pytest.raises(UserError, match=why + "the plan knows qwen2_vl"):
        read_shape({"model_type": "qwen4_exp"}, "x")


def test_a_model_of_qwens_that_is_not_trained_is_refused_with_the_reason(tmp_path):
    transformers.Qwen4ExpConfig().save_pretrained(tmp_path)
    settings = ModelSettings(model_name_or_path=str(tmp_path))
    reason = "n-gram table takes about 90 GiB.*needs a way of transformers to train it"
    with pytest.raises(
        UserError, match=rf"model_name_or_path: {tmp_path} is a \w+ model, which is not trained: .*{reason}"
    ):
        load_config(settings)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("visual", "vision"),
        ("visual.blocks.3.attn.qkv.weight", "vision"),
        ("visual.merger", "merger"),
        ("visual.merger.mlp.0.weight", "merger"),
        ("language_model.layers.0.mlp.gate_proj.lora_A.default.weight", "language"),
        ("lm_head", "language"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_part_of_a_name(family, name, part, prefix):
    assert family.part_of(prefix + name) == part
    assert part in PARTS


def test_mergers_of_deeper_layers_are_mergers():
    assert family_of(Qwen3VLConfig()).part_of("model.visual.deepstack_merger_list.1.linear_fc1.weight") == "merger"


@pytest.mark.parametrize(
    ("config", "own"),
    [
        (Qwen2VLConfig(), set()),
        (Qwen2_5_VLConfig(), {"image_window_index", "image_cu_window_seqlens", "image_max_window_seqlen"}),
        (Qwen3VLConfig(), {"image_interp_indices", "image_interp_weights"}),
        (Qwen3_5Config(), {"image_interp_indices", "image_interp_weights"}),
        (Qwen3VLMoeConfig(), {"image_interp_indices", "image_interp_weights"}),
        (Qwen3_5MoeConfig(), {"image_interp_indices", "image_interp_weights"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_the_tower_is_given(config, own):
    found = Positions(config).patch_inputs(GRIDS)
    assert found.keys() == {"image_position_ids", "image_cu_seqlens", "image_max_seqlen"} | own
    assert found["image_cu_seqlens"].tolist() == [0, 24, 56]
    assert found["image_max_seqlen"] == 32
    assert len(found["image_position_ids"]) == 56


def test_deeper_features_need_the_positions_of_image_tokens():
    layout = PackedLayout([5, 3], [None, 0], torch.tensor([1, 2, 6]))
    text = PackedLayout([5], [None], torch.zeros(0, dtype=torch.long))
    entries = [family.packed_entries(config, layout) for family, config in zip(FAMILIES, CONFIGS, strict=True)]
    assert entries[:2] == [{}, {}]
    assert [value.tolist() for value in entries[2].values()] == [[1, 2, 6]]
    assert FAMILIES[2].packed_entries(CONFIGS[2], text) == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_features_go_through_the_cache_and_back(config):
    """One layer, or for Qwen3-VL's default of three deeper ones four."""
    family, layers = family_of(config), family_of(config).count_feature_layers(config)
    assert layers == (4 if family.name.startswith("Qwen3-VL") else 1)
    features = [(torch.full((2, 3), float(layer)), torch.full((1, 3), float(layer))) for layer in range(layers)]
    assert family.feature_layers(family.feature_output(features)) == features


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_kernel_has_its_layers_or_a_reason_why_not(family):
    assert family.fused_layers.keys() | family.unfit_kernels.keys() == KERNELS.keys() - {LORA}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_tokens_of_a_chat_are_structural(family):
    chat = family.chat
    assert {*chat.visual, chat.end_of_turn} <= set(chat.structural)
    assert (family.packing, family.shared_prefixes, family.feature_cache) == (True, True, True)


def test_what_a_family_cannot_do_is_refused_with_its_reason():
    family = replace(
        FAMILIES[0], packing="its layers carry a state", feature_cache="none", unfit_kernels={"rope": "rotates halves"}
    )
    keys = {"packing": True, "share_prefixes": True, "cache_image_features": "int8", "fused_kernels": ["rope", "lora"]}
    recipe = read_recipe(None, {"model_name_or_path": "some/model", "dataset_name": "data", **keys})
    assert list(problems_of_family(recipe, family)) == [
        "packing does not work with Qwen2-VL: its layers carry a state; set packing: false",
        "cache_image_features does not work with Qwen2-VL: none; leave cache_image_features out",
        "fused_kernels: rope does not fit Qwen2-VL: rotates halves; leave it out",
    ]
    assert not list(problems_of_family(recipe, FAMILIES[0]))


@pytest.mark.parametrize(("name", "value"), [("train_router", True), ("router_aux_loss_coef", 0.001)])
def test_keys_of_experts_are_refused_without_experts(name, value):
    recipe = read_recipe(None, {"model_name_or_path": "some/model", "dataset_name": "data", name: value})
    reason = f"{name} is for mixtures of experts, and Qwen2-VL has no experts; leave it out"
    assert list(problems_of_family(recipe, FAMILIES[0])) == [reason]
    assert not list(problems_of_family(recipe, FAMILIES[4]))


def test_positions_reach_a_worker_that_is_spawned():
    positions = Positions(Qwen2VLConfig())
    assert pickle.loads(pickle.dumps(positions)).family is positions.family


def test_stats_of_an_earlier_version_are_read():
    assert BatchStats.read({"tokens": 9, "learned": 4}) == BatchStats.read({"tokens": 9, "target_tokens": 4})
    assert (
        BatchStats.read(BatchStats(target_tokens=4).stored()).target_tokens
        == BatchStats(target_tokens=4).stored()["learned"]
        == 4
    )


def knowledge_of_families(text):
    """Yield what a module's code, and not its comments and docstrings, names of a family."""
    tree = ast.parse(text)
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Compare):
            names = ["a comparison" for part in ast.walk(node) if getattr(part, "attr", "") == "model_type"]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.alias):
            names = [node.name]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            names = [node.value]
        for name in names:
            known = any(word in name for word in (*CLASSES, *PROBES)) or any(
                part in MODEL_TYPES for part in name.split(".")
            )
            if known or name == "a comparison":
                yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize(
    "line",
    [
        'if config.model_type == "x": pass',
        'x = kind == "qwen3_vl"',
        "from transformers import Qwen2VLConfig",
        'full = hasattr(vision, "fullatt_block_indexes")',
        "from transformers.models.qwen2_5_vl import modeling",
    ],
)
def test_knowledge_of_a_family_is_found(line):
    assert list(knowledge_of_families(line))


def test_no_other_room_knows_a_family():
    package = REPOSITORY / "src/qwen_vl_sft"
    allowed = (package / "families", package / "tools/tiny")
    paths = [*package.rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py")]
    found = {
        str(path.relative_to(REPOSITORY)): known
        for path in paths
        if not any(path.is_relative_to(folder) for folder in allowed)
        and (known := list(knowledge_of_families(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_a_gate_of_one_output_stays_in_16_bits():
    """4 bits would round it coarsely, and save nothing."""
    model = newer("Qwen3_5MoeConfig")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    single = {name.rsplit(".", 1)[-1] for name, module in layers if module.out_features == 1}
    assert single == {"shared_expert_gate"}
    assert single <= set(family_of(model.config).keep_16bit)
