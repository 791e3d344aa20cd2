import errno
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.messages import conversation_row, png
from fixtures.processes import run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.merging import merge as merging
from qwen_vl_sft.merging import weights
from qwen_vl_sft.merging.base import quantized_layers, read_base
from qwen_vl_sft.merging.check import check_model, check_weights, format_report
from qwen_vl_sft.merging.folder import merged_config, staged
from qwen_vl_sft.merging.merge import merge, prepare
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.merging.samples import read_samples
from qwen_vl_sft.merging.weights import requantized
from qwen_vl_sft.modeling.base_model import build_on_meta, load_model

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def base_model(folder=tiny.MODEL_DIR, dtype="float32"):
    return load_model(ModelSettings(model_name_or_path=str(folder), dtype=dtype), on_cpu=True)


def write_run(folder, base=tiny.MODEL_DIR, recipe=None, **lora):
    """A run folder with an adapter of random, non-zero matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **lora}
    adapted = get_peft_model(base_model(base), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny.MODEL_DIR / name, folder)
    keys = {
        "model_name_or_path": str(base),
        "dtype": "float32",
        "dataset_name": str(tiny.DATA_DIR),
        "dataset_test_split": "val",
        "output_dir": str(folder),
        "use_cpu": True,
        **(recipe or {}),
    }
    (folder / "recipe.yaml").write_text(read_recipe(None, keys).to_yaml())
    (folder / "system_message.txt").write_text("Answer with one word.")
    return folder


def options(run, output, **changes):
    return MergeOptions(**{"run": run, "output_dir": output, "dtype": "float32", "samples": 2, **changes})


def run_merge(run, output, **changes):
    return merge(make_plan(options(run, output, **changes)))


def peft_merged(run, base=tiny.MODEL_DIR):
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(base), str(run)).merge_and_unload().state_dict()


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("merge") / "run")


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("merge") / "run", recipe={"load_in_4bit": True})


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}},
        {"target_modules": r"model\.visual\.(blocks\.\d+\.attn\.qkv|merger\.mlp\.0)"},
        {"modules_to_save": ["norm"]},
    ],
)
def test_the_merge_is_pefts_own(tmp_path, lora):
    run = write_run(tmp_path / "run", **lora)
    report = run_merge(run, tmp_path / "merged")
    merged = base_model(tmp_path / "merged").state_dict()
    expected = peft_merged(run)
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    assert report["against_adapter"]["max"] < 1e-4
    assert report["against_adapter"]["same_answers"] == 2


def test_a_bfloat16_merge_keeps_every_other_bit(run, tmp_path):
    report = run_merge(run, tmp_path / "merged", dtype="bfloat16")
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(tiny.MODEL_DIR / "model.safetensors")
    assert set(merged) == set(base)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.startswith("model.") and name.split(".")[-2] in PROJECTIONS} - {
        name for name in base if name.endswith("bias")
    }
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert "base + adapter in bfloat16" in format_report(report)
    assert max(map(len, format_report(report).splitlines()[1:])) <= 120


def test_dequantized_weights_are_those_of_training():
    trained = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32", load_in_4bit=True)
    from bitsandbytes.functional import dequantize_4bit

    model = load_model(trained, on_cpu=True)
    held = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantized_layers(trained) == set(held)
    plain = base_model().state_dict()
    for name, weight in held.items():
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(requantized(plain[f"{name}.weight"], trained, "cpu"), expected)


def test_a_merge_that_knows_of_4_bits_is_what_was_trained(quantized_run, tmp_path):
    aware = run_merge(quantized_run, tmp_path / "aware", nf4_aware=True)["against_adapter"]
    plain = run_merge(quantized_run, tmp_path / "plain")
    assert aware["max"] < 1e-3
    assert aware["same_answers"] == aware["rows"] == 2
    assert plain["against_adapter"]["max"] < 1e-4
    assert plain["against_training"]["max"] > 10 * aware["max"]


@pytest.mark.parametrize(
    "renamed",
    [
        {"visual.": "model.visual.", "model.": "model.language_model."},
        {"visual.": "visual.", "model.": "model.language_model."},
    ],
)
def test_the_key_names_of_the_base_are_kept(tmp_path, renamed):
    base = tmp_path / "base"
    shutil.copytree(tiny.MODEL_DIR, base)
    tensors = load_file(base / "model.safetensors")
    named = {}
    for key, tensor in tensors.items():
        old = "visual." if key.startswith("visual.") else "model."
        named[renamed[old] + key.removeprefix(old)] = tensor
    save_file(named, base / "model.safetensors", metadata={"format": "pt"})
    run = write_run(tmp_path / "run", base)
    run_merge(run, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(named)
    merged, expected = base_model(tmp_path / "merged").state_dict(), peft_merged(run, base)
    assert all(torch.allclose(merged[name], expected[name], rtol=0, atol=1e-6) for name in expected)


def test_names_of_every_family():
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig

    from qwen_vl_sft.merging.places import finder

    with torch.device("meta"):
        three = AutoModelForImageTextToText.from_config(Qwen3VLConfig())
    assert finder(three)("model.language_model.norm.weight").name == "model.language_model.norm.weight"
    two = finder(build_on_meta(ModelSettings(model_name_or_path=str(tiny.MODEL_DIR))))
    for key in ("model.norm.weight", "model.language_model.norm.weight"):
        assert two(key).name == "model.language_model.norm.weight"
    for key in ("visual.blocks.0.norm1.bias", "model.visual.blocks.0.norm1.bias"):
        assert two(key).name == "model.visual.blocks.0.norm1.bias"
    assert two("lm_head.weight").name == "lm_head.weight"


def moe_on_meta(name):
    import transformers

    sizes = {"hidden_size": 8, "moe_intermediate_size": 6, "num_experts": 3, "num_hidden_layers": 1, "vocab_size": 16}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "shared_expert_intermediate_size": 4}
    tower = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    config = getattr(transformers, name)(text_config=sizes, vision_config=tower)
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Qwen3VLMoeConfig", "turned"),
        ("Qwen3VLMoeConfig", "together"),
        ("Qwen3_5MoeConfig", "together"),
        ("Qwen3_5MoeConfig", "apart"),
    ],
)
def test_experts_in_every_form_of_files(name, form, tmp_path):
    """Read as the model has them, merged, and written as the files have them."""
    from qwen_vl_sft.merging.adapter import Adapter, ExpertsLowRank

    model = moe_on_meta(name)
    torch.manual_seed(0)
    state = {key: torch.randn(tensor.shape) for key, tensor in model.state_dict().items()}
    path = "model.language_model.layers.0.mlp.experts."
    whole = {part: state.pop(path + part) for part in ("gate_up_proj", "down_proj")}
    if form == "apart":
        for number in range(3):
            gate, up = whole["gate_up_proj"][number].chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": whole["down_proj"][number]}
            state |= {f"{path}{number}.{part}.weight": tensor.clone() for part, tensor in parts.items()}
    else:
        turned = {part: tensor.mT.contiguous() if form == "turned" else tensor for part, tensor in whole.items()}
        state |= {path + part: tensor for part, tensor in turned.items()}
    save_file(state, tmp_path / "model.safetensors")
    weights = read_base(tmp_path, model)
    added = {
        path + part: ExpertsLowRank.of(torch.randn(3 * 2, tensor.shape[2]), torch.randn(tensor.shape[1], 2 * 3), 3, 0.5)
        for part, tensor in whole.items()
    }
    adapter = Adapter(added, {})
    merged = {part: torch.zeros_like(tensor) for part, tensor in whole.items()}
    for weight in weights:
        before, pair = weight.read(), adapter.reaching(weight)
        if pair is None:
            continue
        after, place = pair.added_to(before), weight.place
        assert weight.as_in_file(after).shape == state[weight.key].shape
        part = merged[weight.name.removeprefix(path)]
        if place.expert is None:
            part.copy_(after)
        else:
            part[place.expert, place.rows(part.shape[1])] = after
    for part, tensor in whole.items():
        pair = added[path + part]
        expected = torch.stack([tensor[n] + 0.5 * pair.b[n] @ pair.a[n] for n in range(3)])
        torch.testing.assert_close(merged[part], expected, rtol=0, atol=1e-5)
    if form == "apart":
        del state[f"{path}1.up_proj.weight"]
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="gate_up_proj is missing some of its 3 experts"):
            read_base(tmp_path, model)


def test_shards_of_the_base_and_of_the_merge(tmp_path, run):
    base = tmp_path / "base"
    base_model(dtype="bfloat16").save_pretrained(base, max_shard_size="1MB")
    assert len(list(base.glob("*.safetensors"))) > 1
    report = run_merge(run, tmp_path / "merged", base=str(base), max_shard_size=3 * 10**6)
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert report["shards"] == 2
    merged, expected = base_model(tmp_path / "merged").state_dict(), peft_merged(run)
    assert all(torch.allclose(merged[name], expected[name], rtol=0, atol=1e-6) for name in expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_tensors_trained_in_full_unties_them(tmp_path, trained):
    run = write_run(tmp_path / "run", modules_to_save=[trained])
    report = run_merge(run, tmp_path / "merged")
    merged = base_model(tmp_path / "merged")
    head, embeddings = merged.lm_head.weight, merged.get_input_embeddings().weight
    saved = load_file(run / "adapter_model.safetensors")
    (whole,) = [tensor for name, tensor in saved.items() if name.endswith(f"{trained}.weight")]
    before = base_model().get_input_embeddings().weight
    assert torch.equal(head, whole if trained == "lm_head" else before)
    assert torch.equal(embeddings, before if trained == "lm_head" else whole)
    assert report["against_adapter"]["max"] < 1e-4


def test_the_merged_folder_is_a_model_and_a_run(quantized_run, tmp_path):
    from qwen_vl_sft.distributed.context import read_context
    from qwen_vl_sft.evaluation import options
    from qwen_vl_sft.inference.models import load_arm, load_run_processor

    merged = tmp_path / "merged"
    merged.mkdir()  # an empty folder may be there
    run_merge(quantized_run, merged)
    assert {"merge.json", "recipe.yaml", "system_message.txt", "generation_config.json", "chat_template.jinja"} <= set(
        left_in(merged)
    )
    plan = options.make_plan(
        parse(options.EvaluateOptions, ["--run", str(merged), "--output_dir", str(tmp_path / "scores")])
    )
    assert plan.system_message == "Answer with one word."
    assert not plan.recipe.model.load_in_4bit
    load_run_processor(plan)
    state = load_arm(plan, "tuned", None, read_context(use_cpu=True)).state_dict()
    expected = peft_merged(quantized_run)
    assert all(torch.allclose(state[name], expected[name], rtol=0, atol=1e-6) for name in expected)

    with pytest.raises(UserError, match="holds a merged model already"):
        run_merge(quantized_run, merged)
    with pytest.raises(UserError, match="is a merged model already"):
        run_merge(merged, tmp_path / "again")


def test_runs_that_cannot_be_merged(run, quantized_run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        run_merge(tmp_path / "none", tmp_path / "merged")
    with pytest.raises(UserError, match="not trained on 4-bit weights"):
        run_merge(run, tmp_path / "merged", nf4_aware=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run_merge(run, tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "recipe.yaml", empty)
    with pytest.raises(UserError, match=r"holds neither adapter_model\.safetensors"):
        run_merge(empty, tmp_path / "merged")
    shutil.copy(tiny.MODEL_DIR / "model.safetensors", empty)
    with pytest.raises(UserError, match=r"full model \(model\.safetensors\) and no adapter"):
        run_merge(empty, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_dora", True, "lora_magnitude_vector is missing from the adapter"),
        ("bias", "all", "bias: all"),
        ("init_lora_weights", "pissa", "init_lora_weights: pissa"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("peft_type", "IA3", "peft_type: IA3"),
        ("r", 5, "there is room for"),
        ("target_modules", ["q_proj", "k_proj"], "does not fit the base model"),
        ("base_model_name_or_path", "other/base", "say which one with --base"),
    ],
)
def test_adapters_that_cannot_be_merged(run, tmp_path, key, value, told):
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=told):
        run_merge(changed, tmp_path / "merged")
    assert left_in(tmp_path) == ["run"]


def test_a_base_whose_weights_have_changed_is_told(run, tmp_path, capsys):
    changed, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(run, changed)
    shutil.copytree(tiny.MODEL_DIR, base)
    (changed / "environment.json").write_text(json.dumps({"base": "a folder of weights 0123456789abcdef"}))
    told = r"was trained on .* \(a folder of weights 0123456789abcdef\), and .* is another model"
    with pytest.raises(UserError, match=told):
        prepare(make_plan(options(changed, tmp_path / "merged")))
    prepare(make_plan(options(changed, tmp_path / "merged", base=str(base))))
    assert "warning: --run: the adapter" in capsys.readouterr().err


def test_another_base_is_refused(run, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(tiny.MODEL_DIR)
    config.text_config.intermediate_size = 192

    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"does not fit the base model.*--base"):
        run_merge(run, tmp_path / "merged", base=str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not here, though"):
        run_merge(run, tmp_path / "merged", base=str(tmp_path / "gone"))


def test_a_base_with_holes_is_refused(run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny.MODEL_DIR, base)
    whole = load_file(base / "model.safetensors")

    def refused(tensors, told):
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=told):
            run_merge(run, tmp_path / "merged", base=str(base))
        assert left_in(tmp_path) == ["base"]

    refused({name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}, "norm.weight is missing")
    refused(whole | {"model.norm.weight": torch.zeros(3)}, "the model's configuration says")
    refused(whole | {"model.norm.weight": torch.zeros(128, dtype=torch.uint8)}, "not quantized")
    refused(whole | {"extra": torch.zeros(1)}, "extra has no place")
    (base / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        run_merge(run, tmp_path / "merged", base=str(base))
    (base / "config.json").write_text("no JSON")
    with pytest.raises(UserError):
        run_merge(run, tmp_path / "merged", base=str(base))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch, failure):
    written = []

    def save(tensors, path, metadata):
        if written:
            raise failure
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", save)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        run_merge(run, tmp_path / "merged", max_shard_size=10**6)
    assert written
    assert expected is KeyboardInterrupt or "cannot be written: No space left on device" in str(caught.value)
    assert left_in(tmp_path) == []


def test_a_link_to_an_empty_folder_is_merged_into(tmp_path):
    (tmp_path / "disk/merged").mkdir(parents=True)
    (tmp_path / "merged").symlink_to(tmp_path / "disk/merged")
    with staged(tmp_path / "merged", needed=0) as folder:
        (folder / "model").touch()
    assert left_in(tmp_path / "disk/merged") == ["model"]
    assert (left_in(tmp_path), left_in(tmp_path / "disk")) == (["disk", "merged"], ["merged"])


def test_a_disk_that_is_too_small_is_told_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"its disk has 0\.0 GB free"):
        run_merge(run, tmp_path / "merged")
    assert left_in(tmp_path) == []


def test_the_checks_find_what_is_wrong(run, tmp_path, monkeypatch):
    folder = tmp_path / "merged"
    run_merge(run, folder, samples=0)
    task = prepare(make_plan(options(run, tmp_path / "other")))
    check_weights(task, folder)
    good = load_file(folder / "model.safetensors")
    base = load_file(tiny.MODEL_DIR / "model.safetensors")
    target = "model.layers.0.self_attn.q_proj.weight"

    def written(**changes):
        save_file({**good, **changes}, folder / "model.safetensors", metadata={"format": "pt"})

    written(**{target: base[target].float()})
    with pytest.raises(UserError, match=r"q_proj\.weight was not changed by the adapter"):
        check_weights(task, folder)
    written(**{"model.norm.weight": good["model.norm.weight"] * 1.001})
    with pytest.raises(UserError, match="differs from the base"):
        check_weights(task, folder)
    written(**{target: good[target] * float("nan")})
    with pytest.raises(UserError, match="cannot hold"):
        check_weights(task, folder)
    written(extra=torch.zeros(1))
    with pytest.raises(UserError, match="extra is in the base or in the merged model"):
        check_weights(task, folder)
    with pytest.raises(UserError, match="extra has no place in it"):
        check_model(task, folder, read_samples(task.plan))
    written(**{target: good[target] + 0.3 * (good[target] - base[target].float())})
    check_weights(task, folder)
    with pytest.raises(UserError, match="its logits differ"):
        check_model(task, folder, read_samples(task.plan))


def test_a_layer_without_an_adapters_effect_fails_the_merge(run, tmp_path):
    idle = tmp_path / "run"
    shutil.copytree(run, idle)
    tensors = load_file(idle / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, idle / "adapter_model.safetensors")
    with pytest.raises(UserError, match="was not changed by the adapter"):
        run_merge(idle, tmp_path / "merged")
    assert left_in(tmp_path) == ["run"]


def test_rows_that_cannot_be_read_are_named_before_anything_is_merged(run, messages_folder, tmp_path, monkeypatch):
    data = messages_folder([conversation_row(), conversation_row(images=("images/half.png",))])
    (data / "images/half.png").write_bytes(png()[:60])
    plan = make_plan(options(run, tmp_path / "merged"))
    keys = {"dataset_name": str(data), "dataset_format": "messages", "dataset_test_split": "train"}

    def on_these_rows(**changes):
        return replace(plan, recipe=read_recipe(run / "recipe.yaml", keys | changes))

    assert len(read_samples(on_these_rows(bad_rows="skip")).conversations) == 1
    monkeypatch.setattr(merging, "write_weights", lambda *args: pytest.fail("it was merged"))
    with pytest.raises(UserError, match=r"row 1 image .*half\.png.*; give --samples 0"):
        merge(on_these_rows())


def test_rows_that_are_gone(run, tmp_path):
    plan = make_plan(options(run, tmp_path / "merged"))
    plan = replace(plan, recipe=read_recipe(run / "recipe.yaml", {"dataset_name": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="give --samples 0"):
        merge(plan)
    assert left_in(tmp_path) == []


def test_the_command_line():
    given = parse(MergeOptions, ["--run", "a", "--output_dir", "b", "--max_shard_size", "500MB", "--nf4_aware"])
    assert (given.max_shard_size, given.nf4_aware, given.samples) == (500_000_000, True, 4)
    for wrong, told in (
        (["--max_shard_size", "big"], "--max_shard_size: 'big' is not a size such as 4GB"),
        (["--samples", "-1"], "--samples: -1 is below 0"),
        (["--dtype", "int4"], "--dtype: 'int4' is not one of bfloat16, float16, float32"),
        (["--max_shard_size", "0GB"], "--max_shard_size: '0GB' is not a size such as 4GB"),
    ):
        with pytest.raises(UserError, match=f"^command line: {told}"):
            parse(MergeOptions, ["--run", "a", "--output_dir", "b", *wrong])


def test_weights_are_read_in_the_order_of_the_files():
    model = build_on_meta(ModelSettings(model_name_or_path=str(tiny.MODEL_DIR)))
    weights = read_base(tiny.MODEL_DIR, model)
    assert {weight.name for weight in weights} == set(model.state_dict()) - {"lm_head.weight"}


def test_a_short_run_from_the_command_line(tmp_path):
    quick = "--max_steps 3 --max_train_samples 48 --eval_strategy no --save_strategy no --load_best_model_at_end false"
    run, output = tmp_path / "run", tmp_path / "merged"
    trained = run_process("scripts/sft.py", "--recipe", "recipes/quickstart.yaml", "--output_dir", run, *quick.split())
    assert trained.returncode == 0, trained.stderr[-2000:]
    words = ("scripts/merge.py", "--run", run, "--output_dir", output, "--nf4_aware", "--dtype", "float32")
    merged = run_process(*words)
    assert merged.returncode == 0, merged.stderr[-2000:]
    assert "answers      4 of 4 the same" in merged.stdout
    assert json.loads((output / "merge.json").read_text())["against_adapter"]["max"] < 1e-3
    again = run_process(*words)
    assert again.returncode == 2
    assert again.stderr.startswith("error: --output_dir:")


LAYOUTS = {
    "transformers before 4.52": ("model.", "visual."),
    "for vLLM": ("language_model.model.", "visual."),
    "with the tower outside": ("model.language_model.", "visual."),
}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """A run with LoRA in the language model and in the vision tower, of other ranks and scales here and there."""
    language = r"language_model\.layers\.\d\.(self_attn\.q_proj|mlp\.gate_proj)"
    targets = rf"model\.({language}|visual\.(blocks\.\d\.attn\.qkv|merger\.mlp\.0))"
    lora = {"target_modules": targets, "rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"qkv": 32}}
    return write_run(tmp_path_factory.mktemp("everywhere") / "run", **lora)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_adapter_of_another_trainer_merges_into_the_same_tensors(everywhere, tmp_path, layout):
    language, visual = layout
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tensors = load_file(everywhere / "adapter_model.safetensors")
    new = {"model.language_model.": language, "model.visual.": visual}
    renamed = {
        re.sub(r"(?<=base_model\.model\.)model\.(language_model|visual)\.", lambda found: new[found[0]], key): tensor
        for key, tensor in tensors.items()
    }
    assert not set(renamed) <= set(tensors)
    save_file(renamed, theirs / "adapter_model.safetensors")
    config = json.loads((everywhere / "adapter_config.json").read_text())
    targets = rf"^({re.escape(language)}layers.*(q_proj|gate_proj)|{re.escape(visual)}.*(qkv|merger\.mlp\.0))$"
    (theirs / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    assert left_in(theirs) == ["adapter_config.json", "adapter_model.safetensors"]  # no recipe, no processor
    report = run_merge(theirs, tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged/model.safetensors"), peft_merged(everywhere)
    names = read_names(tmp_path / "merged")
    assert all(torch.allclose(merged[key], expected[name], rtol=0, atol=1e-6) for key, name in names.items())
    assert report["against_adapter"]["max"] < 1e-4
    assert report["against_adapter"]["adapter_effect"] > 100 * report["against_adapter"]["mean"]
    assert (tmp_path / "merged/processor_config.json").is_file()


def read_names(folder):
    """The name in the model of each key in a merged folder."""
    model = build_on_meta(ModelSettings(model_name_or_path=str(folder)))
    return {weight.key: weight.name for weight in read_base(folder, model)}


@pytest.mark.parametrize("theta", [1e4, 5e6])
def test_the_positions_stand_where_transformers_4_looks_for_them(theta):
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    written = Qwen3VLConfig(text_config={"rope_parameters": rope}).to_dict()
    config = merged_config(json.loads(json.dumps(written)), "bfloat16", unties=False)
    text = config["text_config"]
    assert text["rope_theta"] == theta
    assert text["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert "rope_scaling" not in config["vision_config"]
    read = Qwen3VLConfig(**config)
    assert read.text_config.rope_parameters == Qwen3VLConfig(**written).text_config.rope_parameters
    old = {"rope_theta": theta, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    assert merged_config(dict(old), "bfloat16", unties=False) == {**old, "dtype": "bfloat16"}


def test_experts_and_head_stand_where_transformers_4_looks_for_them():
    from transformers import Qwen3VLMoeConfig

    written = Qwen3VLMoeConfig(text_config={"num_experts": 6}).to_dict()
    assert "num_experts" not in written["text_config"]
    config = merged_config(json.loads(json.dumps(written)), "bfloat16", unties=False)
    text = config["text_config"]
    assert (text["num_experts"], text["num_local_experts"]) == (6, 6)
    assert (config["tie_word_embeddings"], text["tie_word_embeddings"]) == (False, False)
    read = Qwen3VLMoeConfig(**config)
    assert read.text_config.num_experts == 6
    assert not read.tie_word_embeddings
    tied = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "num_experts": 6}}
    assert merged_config(json.loads(json.dumps(tied)), "bfloat16", unties=False) == {**tied, "dtype": "bfloat16"}


def test_rows_that_end_inside_a_block_of_4_bits_are_unpacked_right_on_a_cpu():
    """As wide as an MLP of Qwen3-VL's tower; bitsandbytes 0.50.2 alone is 25% off there."""
    torch.manual_seed(0)
    weight = torch.randn(64, 4304)
    settings = ModelSettings(load_in_4bit=True, dtype="float32")
    assert float((requantized(weight, settings, "cpu") - weight).norm() / weight.norm()) < 0.1
