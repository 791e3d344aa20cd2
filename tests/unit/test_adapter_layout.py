"""Adapters as other trainers write them: names of their layers, patterns, and what has no place."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.source import read_source
from qwen_vl_sft.merging.adapter import read_adapter
from qwen_vl_sft.modeling.adapter_layout import adapted_layers, bare, in_our_layout, place
from qwen_vl_sft.modeling.base_model import build_on_meta

PREFIX = "base_model.model."
NOW = {"language": "model.language_model.", "visual": "model.visual."}
# Prefixes of the language model and of the vision tower, after PEFT's own.
LAYOUTS = {
    "transformers before 4.52": {"language": "model.", "visual": "visual."},
    "for vLLM": {"language": "language_model.model.", "visual": "visual."},
    "with the tower outside": {"language": "model.language_model.", "visual": "visual."},
}
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What these trainers put into `target_modules`, from their own adapters of Qwen2-VL and Qwen2.5-VL.
SWIFT = r"^(model(?=\.).*\.(k_proj|up_proj|v_proj|down_proj|gate_proj|o_proj|q_proj))$"
LLAMA_FACTORY = "^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*"
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:qkv|proj|q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:qkv|proj|q_proj|k_proj|v_proj|o_proj|gate_proj|"
    r"up_proj|down_proj)))"
)


def model():
    return build_on_meta(ModelSettings(model_name_or_path=str(tiny.MODEL_DIR)))


def renamed(name, layout):
    for part, prefix in NOW.items():
        if name.startswith(PREFIX + prefix):
            return PREFIX + layout[part] + name.removeprefix(PREFIX + prefix)
    return name


def keys_of(layout=NOW, **lora):
    """The keys that PEFT writes for an adapter of the tiny model, in a layout."""
    adapted = get_peft_model(model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **lora}))
    return [renamed(key, layout) for key in get_peft_model_state_dict(adapted, save_embedding_layers=False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("base_model.model.model.visual.merger.mlp.0", "visual.merger.mlp.0"),
        ("visual.blocks.3.attn.qkv", "visual.blocks.3.attn.qkv"),
        ("_fsdp_wrapped_module.base_model.model.lm_head", "lm_head"),
        ("model._orig_mod.layers.1._checkpoint_wrapped_module.mlp.up_proj", "layers.1.mlp.up_proj"),
        ("model.language_model", ""),
    ],
)
def test_the_name_that_all_layouts_share(name, expected):
    assert bare(name) == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("targets", [["q_proj", "qkv", "mlp.0"], r".*(visual|layers\.[01]\.).*(qkv|q_proj|mlp\.0)"])
def test_every_layout_has_its_place(layout, targets):
    ours = keys_of(target_modules=targets)
    theirs = [renamed(key, layout) for key in ours]
    found = place({"target_modules": targets, "r": 2}, theirs, model())
    assert list(found.names.values()) == ours
    assert sorted(found.config["target_modules"]) == sorted(
        {key.split(".lora_")[0].removeprefix(PREFIX) for key in ours}
    )
    assert adapted_layers(theirs) == adapted_layers(ours)
    assert place(found.config, ours, model()) is None


def test_an_adapter_of_this_version_is_left_as_it_is():
    for lora in ({}, {"target_modules": LANGUAGE}, {"use_dora": True}, {"modules_to_save": ["norm"]}):
        assert place({"target_modules": ["q_proj"], **lora}, keys_of(**lora), model()) is None


@pytest.mark.parametrize(
    "targets", [SWIFT, LLAMA_FACTORY, UNSLOTH, LANGUAGE], ids=["ms-swift", "LLaMA-Factory", "unsloth", "TRL"]
)
def test_patterns_mean_what_they_meant_where_they_were_written(targets):
    layout = LAYOUTS["transformers before 4.52"]
    theirs = keys_of(layout, target_modules=LANGUAGE)
    if targets is UNSLOTH:  # its tags find the tower, too
        theirs += keys_of(layout, target_modules=r"model\.visual\..*\.(qkv|proj)")
        theirs = [key for key in theirs if "patch_embed" not in key]
    found = place({"target_modules": targets}, theirs, model())
    assert {bare(name) for name in found.config["target_modules"]} == adapted_layers(theirs)


def test_a_pattern_of_the_language_model_does_not_reach_the_tower_that_moved_under_it():
    pattern = r"^(model(?=\.).*\.(q_proj|fc1))$"
    assert sum("visual" in key for key in keys_of(target_modules=pattern)) == 2 * 5
    theirs = keys_of(LAYOUTS["transformers before 4.52"], target_modules=["q_proj"])
    assert len(place({"target_modules": pattern}, theirs, model()).config["target_modules"]) == 4


def test_llama_factory_lists_every_layer_by_its_full_name():
    layout = LAYOUTS["transformers before 4.52"]
    theirs = keys_of(layout, target_modules=LANGUAGE)
    listed = sorted({key.split(".lora_")[0].removeprefix(PREFIX) for key in theirs})
    found = place({"target_modules": listed}, theirs, model())
    assert len(found.config["target_modules"]) == len(listed) == 28
    assert all(name.startswith("model.language_model.layers.") for name in found.config["target_modules"])


def test_ranks_and_scales_stay_with_their_layers():
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 8, "v_proj": 4},
        "alpha_pattern": {r"layers\.[23]\..*": 64},
    }
    theirs = keys_of(LAYOUTS["transformers before 4.52"], target_modules=["q_proj", "v_proj"])
    found = place(config, theirs, model()).config
    lora = LoraConfig(r=2, **{key: found[key] for key in ("target_modules", "rank_pattern", "alpha_pattern")})
    layers = get_peft_model(model(), lora).base_model.model.model.language_model.layers
    assert [layer.self_attn.q_proj.r["default"] for layer in layers] == [2, 8, 2, 2]
    assert [layer.self_attn.v_proj.r["default"] for layer in layers] == [4] * 4
    assert [layer.self_attn.q_proj.lora_alpha["default"] for layer in layers] == [8, 8, 64, 64]


def test_keys_with_the_adapters_name_and_wrappers():
    keys = {
        "_fsdp_wrapped_module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": (
            "layers.0.self_attn.q_proj.lora_A.weight"
        ),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default": "layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight": (
            "layers.0.self_attn.q_proj.lora_magnitude_vector"
        ),
        "base_model.model.model.norm.modules_to_save.default.weight": "norm.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight": "layers.1.self_attn.q_proj.lora_A.weight",
    }
    found = place({"target_modules": ["q_proj"]}, keys, model()).names
    assert found == {key: f"{PREFIX}model.language_model.{name}" for key, name in keys.items()}


def written(folder, layout, config, tensors):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


@pytest.fixture
def adapter():
    """Function: keys and random tensors of an adapter of the tiny model."""

    def make(**lora):
        adapted = get_peft_model(model(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **lora}))
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        torch.manual_seed(0)
        return {key: torch.randn(tensor.shape) for key, tensor in state.items()}

    return make


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_modules_saved_whole_and_magnitudes_are_read(tmp_path, adapter, layout):
    tensors = adapter(use_dora=True, modules_to_save=["model.language_model.norm"])
    config = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": [f"{layout['language']}norm"]}
    folder = written(
        tmp_path / "theirs", layout, config, {renamed(key, layout): value for key, value in tensors.items()}
    )
    found = read_adapter(folder, model())
    assert len(found.pairs) == 4
    assert all(pair.magnitude is not None for pair in found.pairs.values())
    (name,) = found.whole
    assert name == "model.language_model.norm.weight"
    assert torch.equal(found.whole[name], tensors[PREFIX + name])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda old: {key.replace("layers.3", "layers.9"): old[key] for key in old}, r"layers\.9.* has no place"),
        (lambda old: {key: old[key] for key in old if "layers.3" not in key}, r"layers\.3.* is missing"),
        (lambda old: {key.replace("model.layers", "model.decoder.layers"): old[key] for key in old}, "decoder"),
    ],
)
def test_what_has_no_place_is_told_once(tmp_path, adapter, change, told):
    layout = LAYOUTS["transformers before 4.52"]
    tensors = change({renamed(key, layout): value for key, value in adapter().items()})
    folder = written(tmp_path / "theirs", layout, {"target_modules": ["q_proj"]}, tensors)
    with pytest.raises(UserError, match=told) as caught:
        read_adapter(folder, model())
    assert len(caught.value.problems) == 1
    assert str(folder) in str(caught.value)


def test_the_folder_of_an_adapter_is_not_changed_and_nothing_is_left(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    layout = LAYOUTS["transformers before 4.52"]
    tensors = {renamed(key, layout): value for key, value in adapter().items()}
    folder = written(tmp_path / "theirs", layout, {"target_modules": ["q_proj"]}, tensors)
    with in_our_layout(folder, model()) as there:
        assert there != folder
        assert set(load_file(there / "adapter_model.safetensors")) == {*adapter()}
    assert list((tmp_path / "temporary").iterdir()) == []
    assert set(load_file(folder / "adapter_model.safetensors")) == set(tensors)


def test_an_adapter_of_a_kind_that_peft_does_not_know_is_told(tmp_path, adapter):
    for kind in ("WHATEVER", None):
        folder = written(tmp_path / str(kind), NOW, {"peft_type": kind}, adapter())
        with pytest.raises(UserError, match="does not know; install a PEFT that does"), in_our_layout(folder, model()):
            pass
    folder = written(tmp_path / "ia3", NOW, {"peft_type": "IA3"}, adapter())
    with in_our_layout(folder, model()) as there:
        assert there == folder


def test_an_adapter_that_cannot_be_read_as_it_is_says_why(tmp_path, adapter):
    folder = written(tmp_path / "theirs", NOW, {"base_model_name_or_path": None}, adapter())
    with pytest.raises(UserError, match=r"adapter_config.json names no base model; name it with --model_name_or_path"):
        read_source(folder, {}, tuned_needed=True)
    assert read_source(folder, {"model_name_or_path": "some/model"}, tuned_needed=True).tuned.is_adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds its adapter as adapter_model\.bin, a pickle"):
        read_source(folder, {}, tuned_needed=True)
