import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.models import SMALL_SHAPE
from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import (
    build_on_meta,
    count_parameters,
    format_parameters,
    freeze_vision_tower,
    is_vision_frozen,
    load_model,
    load_processor,
)
from qwen_vl_sft.modeling.flops import BatchStats, FlopCounter, peak_flops
from qwen_vl_sft.modeling.loaded_weights import load_full_weights
from qwen_vl_sft.modeling.lora import find_targets, lora_config, outside_scope, shortest_targets
from qwen_vl_sft.modeling.structure import build_structure
from qwen_vl_sft.tools.random_model import make_random_model
from qwen_vl_sft.training.model_setup import keep_trained_weights_in_float32

TINY = str(tiny.MODEL_DIR)


def settings(**changes):
    return ModelSettings(**{"model_name_or_path": TINY, "dtype": "float32", **changes})


@pytest.fixture(scope="module")
def seven_b(shared):
    """The real 7B's structure, without weights."""
    return settings(model_name_or_path=str(shared / "qwen2vl/config-7b"))


@pytest.mark.parametrize("template", [None, {"rag": "{{ messages }}"}])
def test_a_processor_without_a_chat_template_is_refused(template, tmp_path):
    for file in tiny.MODEL_DIR.iterdir():
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    if template:
        (tmp_path / "additional_chat_templates").mkdir()
        for name, text in template.items():
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    with pytest.raises(
        UserError, match=f"model_name_or_path: {tmp_path} has no chat template.*copy chat_template.jinja"
    ):
        load_processor(settings(model_name_or_path=str(tmp_path)))


def qwen_2_5_and_3(tied=False):
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

    text = {**SMALL_SHAPE["text_config"], "vocab_size": 200}
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    for config in (
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**vision, "fullatt_block_indexes": [1]},
            tie_word_embeddings=tied,
        ),
        Qwen3VLConfig(
            text_config={**text, "head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}},
            vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
            tie_word_embeddings=tied,
        ),
    ):
        with torch.device("meta"):
            yield AutoModelForImageTextToText.from_config(config)


def test_the_tutorials_parameter_counts(seven_b):
    from peft import get_peft_model

    seven_b = replace(seven_b, lora_target_modules=["q_proj", "v_proj"], lora_r=8)
    model = build_on_meta(seven_b)
    config = lora_config(model, seven_b)
    assert config.target_modules == {"q_proj", "v_proj"}
    counts = count_parameters(get_peft_model(model, config))
    assert sum(count.total for count in counts.values()) == 8_293_898_752
    assert {part: count.trainable for part, count in counts.items()} == {
        "vision": 0,
        "merger": 0,
        "language": 2_523_136,
    }
    assert max(len(line) for line in format_parameters(counts).splitlines()) <= 80


@pytest.mark.parametrize(
    ("scope", "layers"), [("language", 28 * 7), ("vision", 32 * 4), ("merger", 2), ("all", 28 * 7 + 32 * 4 + 2)]
)
def test_scopes_of_qwen2_vl(seven_b, scope, layers):
    seven_b = replace(seven_b, lora_target_modules=None, lora_scope=scope)
    model = build_on_meta(seven_b)
    targets = find_targets(model, seven_b)
    assert len(targets) == layers
    assert {family_of(model.config).part_of(name) for name in targets} == (
        {"language", "vision", "merger"} if scope == "all" else {scope}
    )
    assert _hit(model, shortest_targets(model, targets)) == targets


def test_scopes_of_the_newer_models():
    from peft import get_peft_model

    for scope in ("language", "vision", "merger", "all"):
        for model in qwen_2_5_and_3():
            wanted = settings(lora_scope=scope)
            targets = find_targets(model, wanted)
            assert {family_of(model.config).part_of(name) for name in targets} == (
                {"language", "vision", "merger"} if scope == "all" else {scope}
            )
            assert _hit(model, shortest_targets(model, targets)) == targets
            planned = build_structure(model, wanted).parameters
            adapted = get_peft_model(model, lora_config(model, wanted))
            trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
            assert len(trained) == 2 * len(targets)
            assert planned == count_parameters(adapted)


@pytest.mark.parametrize(
    "keys", [{"use_dora": True}, {"lora_modules_to_save": ["norm"]}, {"lora_r": 3, "use_rslora": True}]
)
def test_parameters_are_counted_as_peft_makes_them(keys):
    from peft import get_peft_model

    wanted = settings(lora_scope="all", **keys)
    planned = build_structure(build_on_meta(wanted), wanted).parameters
    model = build_on_meta(wanted)
    assert planned == count_parameters(get_peft_model(model, lora_config(model, wanted)))


def _hit(model, pattern):
    """The layers that PEFT would wrap."""
    import re

    names = [name for name, _ in model.named_modules()]
    if isinstance(pattern, str):
        return [name for name in names if re.fullmatch(pattern, name)]
    return [name for name in names if any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern)]


def test_a_target_that_matches_nothing_is_refused():
    model = build_on_meta(settings())
    with pytest.raises(UserError, match=r"lora_target_modules: wq match.* no linear layer .* q_proj"):
        find_targets(model, settings(lora_target_modules=["q_proj", "wq"]))
    with pytest.raises(UserError, match="lora_target_modules: all-linear stands beside other names"):
        find_targets(model, settings(lora_target_modules=["all-linear", "q_proj"]))
    with pytest.raises(UserError, match="lm_head"):
        find_targets(model, settings(lora_target_modules=["lm_head"]))


def test_targets_outside_the_scope_are_told():
    model = build_on_meta(settings())
    wanted, part_of = settings(lora_target_modules=["q_proj", "qkv"]), family_of(model.config).part_of
    parts = [part_of(name) for name in find_targets(model, wanted)]
    (warning,) = outside_scope(parts, wanted)
    assert "of the vision part, outside lora_scope language" in warning
    assert not build_structure(model, wanted).adapts_language_only
    assert outside_scope(parts, settings(lora_scope="all")) == []


def test_the_patch_embedding_never_gets_lora():
    model = build_on_meta(settings())
    assert all("patch_embed" not in name for name in find_targets(model, settings(lora_target_modules=["proj"])))


def test_other_models_are_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a gpt2 model; this package trains Qwen2-VL"):
        load_processor(settings(model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_processor(settings(model_name_or_path=str(tmp_path / "none")))


def test_pickled_weights_are_refused_unless_asked(tmp_path):
    model = load_model(settings(), on_cpu=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(settings(model_name_or_path=str(tmp_path)), on_cpu=True)
    load_model(settings(model_name_or_path=str(tmp_path), use_safetensors=False), on_cpu=True)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_model_that_is_stored_quantized_is_refused_before_it_is_loaded(tmp_path, part):
    config = json.loads((tiny.MODEL_DIR / "config.json").read_text())
    (config[part] if part else config)["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (build_on_meta, lambda given: load_model(given, on_cpu=True)):
        for keys in ({}, {"load_in_4bit": True}):
            with pytest.raises(UserError, match=r"holds FP8 weights; set load_in_fp8: true .* name the 16-bit model"):
                load(settings(model_name_or_path=str(tmp_path), **keys))


def changed_files(model, folder, change):
    """A folder of the model, with other tensors in its file."""
    model.save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("place", "tied"), [(0, True), (1, False)])
def test_every_weight_comes_from_a_file(place, tied, tmp_path):
    """transformers gives weights that it does not find random values, and goes on."""
    model = [*qwen_2_5_and_3(tied)][place].to_empty(device="cpu")
    buffers = {"model.rotary_emb.inv_freq": torch.ones(8)}  # in older checkpoints; transformers leaves them out
    folder = changed_files(model, tmp_path / "whole", lambda tensors: tensors | buffers)
    for keys in ({}, {"load_in_4bit": True}, {"load_in_8bit": True}):
        load_model(settings(model_name_or_path=folder, **keys), on_cpu=True)
    up = "layers.1.mlp.up_proj.weight"

    def without(end):
        return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}

    def shortened(tensors):
        return {name: tensor[:-1].clone() if name.endswith(up) else tensor for name, tensor in tensors.items()}

    changes = {
        rf"language_model\.{up} is missing": without(up),
        r"score\.weight has no place in it": lambda tensors: {**tensors, "score.weight": torch.zeros(1)},
        rf"language_model\.{up} has another shape": shortened,
    }
    if not tied:
        changes[r"lm_head\.weight is missing"] = without("lm_head.weight")
    for number, (told, change) in enumerate(changes.items()):
        folder = changed_files(model, tmp_path / str(number), change)
        with pytest.raises(UserError, match=told):
            load_model(settings(model_name_or_path=folder), on_cpu=True)
        with pytest.raises(UserError, match=told):
            load_full_weights(model, folder)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights(bits):
    import bitsandbytes as bnb

    model = load_model(settings(**{bits: True}), on_cpu=True)
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    quantized = bnb.nn.Linear4bit if bits == "load_in_4bit" else bnb.nn.Linear8bitLt
    assert quantized in kinds
    assert type(model.lm_head) is torch.nn.Linear
    plain = count_parameters(load_model(settings(), on_cpu=True))
    assert {part: count.total for part, count in count_parameters(model).items()} == {
        part: count.total for part, count in plain.items()
    }
    if bits == "load_in_4bit":
        state = model.model.language_model.layers[0].self_attn.q_proj.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)


@pytest.mark.parametrize(
    ("strategy", "computed_in", "storage"),
    [
        ("ddp", torch.bfloat16, torch.uint8),
        ("fsdp2", torch.bfloat16, torch.bfloat16),
        ("fsdp2", torch.float16, torch.float16),
        ("fsdp2", None, torch.float32),
    ],
)
def test_fsdp2_gets_4bit_values_in_the_type_it_computes_in(strategy, computed_in, storage):
    """It turns every other type of floats into that one, which is no longer the same 4-bit values."""
    model = load_model(settings(load_in_4bit=True), on_cpu=True, strategy=strategy, computed_in=computed_in)
    weights = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    assert {weight.dtype for weight in weights} == {storage}
    assert next(iter(model.parameters())).dtype == torch.float32


def test_4bit_weights_survive_an_evaluation_on_a_cpu():
    """bitsandbytes repacks them in place in an evaluation forward on CPUs with AVX512-BF16; see the workaround."""
    model = load_model(settings(load_in_4bit=True, dtype="bfloat16"), on_cpu=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert before
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in before.items())


def test_full_fine_tuning_can_freeze_the_vision_tower():
    model = load_model(settings(), on_cpu=True)
    assert not is_vision_frozen(model)
    freeze_vision_tower(model)
    counts = count_parameters(model)
    assert counts["vision"].trainable == 0
    assert counts["merger"].trainable == counts["merger"].total > 0
    assert counts["language"].trainable == counts["language"].total


def test_flops_of_the_7b(shared):
    """Against the closed formula of the shape, and the published figure of about 15 GFLOP a token forward."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(shared / "qwen2vl/config-7b")
    counter = FlopCounter.of(config, peft=True, trained={"language"})
    layer = 3584 * (3584 * 2 + 2 * 512) + 3 * 3584 * 18944
    assert counter.forward.per_token == 2 * 28 * layer
    vision = 32 * (4 * 1280 * 1280 + 2 * 1280 * 5120)
    assert counter.forward.per_patch == 2 * vision
    assert counter.forward.per_merged_patch == 2 * (5120 * 5120 + 5120 * 3584) / 4
    row = BatchStats(
        tokens=610, tokens_squared=610**2, target_tokens=5, images=1, patches=2000, patches_squared=2000**2, rows=1
    )
    weights = 28 * 2 * layer * 610 + 2 * 3584 * 152064 * 5
    attention = 28 * 2 * 3584 * 610**2
    image = (counter.forward.per_patch + counter.forward.per_merged_patch) * 2000 + 32 * 4 * 1280 * 2000**2
    assert counter.flops(row) == pytest.approx(2 * weights + 3 * attention + image)
    packed = FlopCounter.of(config, peft=True, trained={"language"}, packed=True)
    assert counter.flops(row) - packed.flops(row) == 2 * 2 * 3 * 3584 * 18944 * (610 - 5)
    merger = FlopCounter.of(config, peft=True, trained={"merger", "language"})
    assert merger.flops(row) - counter.flops(row) == pytest.approx(counter.forward.per_merged_patch * 2000)
    tower = FlopCounter.of(config, peft=False, trained={"vision"})
    assert tower.flops(row) == pytest.approx(3 * (weights + attention + image))


def test_flops_are_those_that_pytorch_counts():
    """Of everything frozen but what the gradients must reach; PyTorch counts the whole square of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = load_model(settings(attn_implementation="eager"), on_cpu=True).requires_grad_(False)
    model.model.language_model.layers[0].input_layernorm.requires_grad_(True)
    counter = FlopCounter.of(model.config, peft=True, trained={"vision", "merger", "language"})
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.arange(96)[None]).logits.sum().backward()
    expected = counter.flops(BatchStats(tokens=96, tokens_squared=2 * 96**2, target_tokens=96))
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-2)
    visual, vision = model.model.visual, model.config.vision_config
    visual.blocks[0].norm1.requires_grad_(True)
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    with FlopCounterMode(display=False) as counted:
        visual(torch.randn(64, values), torch.tensor([[1, 8, 8]])).pooler_output.sum().backward()
    first_layer = 2 * 64 * vision.embed_dim * values
    expected = counter.flops(BatchStats(images=1, patches=64, patches_squared=64**2)) + first_layer
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("a toaster", None),
    ],
)
def test_the_peak_of_a_card(name, peak):
    assert peak_flops(name) == peak


def test_flops_of_the_newer_towers():
    """Qwen2.5-VL's windows of 8 x 8 patches, which all but four layers attend in; Qwen3-VL's mergers of deeper layers."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    windows = FlopCounter.of(Qwen2_5_VLConfig(), peft=True, trained={"language"})
    width, inner = 3584, 3420
    layers = 2 * 32 * (4 * width * width + 3 * width * inner)
    assert windows.forward.per_patch_squared == 4 * 4 * width
    assert windows.forward.per_patch == layers
    assert windows.forward.per_patch_products == 4 * 28 * width * 64
    row = BatchStats(images=1, patches=640, patches_squared=640**2)
    seen = 4 * 28 * width * 64 * 640 + 4 * 4 * width * 640**2
    frozen, tower = windows.flops(row), FlopCounter.of(Qwen2_5_VLConfig(), peft=True, trained={"vision"}).flops(row)
    assert tower - frozen == pytest.approx((layers + windows.forward.per_merged_patch) * 640 + 2 * seen)
    deeper = FlopCounter.of(Qwen3VLConfig(), peft=True, trained={"language"})
    width, inner, text = 1152, 4304, Qwen3VLConfig().text_config.hidden_size
    merger = 2 * (4 * width) * (4 * width + text) / 4
    assert deeper.forward.per_patch_squared == 4 * 27 * width
    assert deeper.forward.per_patch == 2 * 27 * (4 * width * width + 2 * width * inner)
    assert deeper.forward.per_merged_patch == pytest.approx(4 * merger)


def test_random_models_refuse_a_used_folder_and_unknown_overrides(shared, tmp_path):
    (tmp_path / "file").touch()
    config = str(shared / "qwen2vl/config-2b")
    with pytest.raises(UserError, match="exists and is not empty"):
        make_random_model(config, tmp_path, str(shared / "qwen2vl"))
    with pytest.raises(UserError, match="text_config has no width"):
        make_random_model(config, tmp_path / "new", str(shared / "qwen2vl"), overrides={"text_config": {"width": 1}})
    for overrides, told in (
        ([1], r"\[1\] is no object"),
        ({"text_config": {"num_attention_heads": 3}}, "must be divisible"),
        ({"text_config": {"hidden_size": "x"}}, "expected int, got str"),
    ):
        with pytest.raises(UserError, match=told):
            make_random_model(TINY, tmp_path / "new", overrides=overrides)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_is_kept_in_float32(dtype):
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)]).to(dtype)
    keep_trained_weights_in_float32(layers)
    assert [layer.weight.dtype for layer in layers] == [torch.float32, dtype]
