import contextlib
import dataclasses
import re
import runpy
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trl import SFTConfig

from fixtures.repository import REPOSITORY
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.config.coercion import coerce, expected, is_text, load_yaml
from qwen_vl_sft.config.command_line import format_help, parse, recipe_values
from qwen_vl_sft.config.other_trainers import FORMER_KEYS, WITHOUT_COUNTERPART
from qwen_vl_sft.config.reading import build, key_hints, read_recipe, text_keys
from qwen_vl_sft.config.settings import FIXED_TRAINING_ARGUMENTS, REFUSED_KEYS, TRAINING_DEFAULTS
from qwen_vl_sft.config.trl_keys import TRL_KEYS
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.training import plan, plan_warnings, rules
from qwen_vl_sft.training.options import TrainOptions

SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))
ALONE = DistributedContext("single", 1, 0, 0, on_cpu=True)
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def overrides_of(words):
    """What the command line of sft.py puts over the recipe."""
    return recipe_values(parse(TrainOptions, words).recipe_keys)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"predict_with_generate": True, "eval_steps": 5}, ["eval_steps has no", "predict_with_generate has no"]),
        ({"predict_with_generate": False}, []),
        ({"tokens_per_batch": 500}, ["tokens_per_batch has no effect without packing"]),
        ({"dataset_streaming": True, "dataloader_num_workers": 2}, ["dataloader_num_workers above 1 has no effect"]),
        ({"dataset_streaming": True, "dataloader_num_workers": 1}, []),
        (
            {"use_peft": True, "lora_target_modules": "all-linear"},
            ["lora_target_modules: all-linear covers lora_scope"],
        ),
        ({"use_peft": True, "lora_target_modules": "all-linear", "lora_scope": "all"}, []),
    ],
)
def test_keys_without_an_effect_are_told(keys, told):
    others = {"model_name_or_path": "some/model", "dataset_name": "data", "use_peft": False, "dtype": "float32"}
    found = plan_warnings.warnings(read_recipe(None, {**others, **keys}), [])
    assert [text[: len(start)] for text, start in zip(found, told, strict=True)] == told


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "float32, computed in bfloat16"),
        ({"bf16": False}, "float32"),
        ({"fp16": True}, "float32, computed in float16"),
        ({"dtype": "bfloat16", "use_peft": False}, "bfloat16, what trains is kept in float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        (
            {"dtype": "bfloat16", "fp8_gradients": "emulation"},
            "bfloat16, gradients of inputs by products in FP8, emulated in float32",
        ),
    ],
)
def test_the_plan_tells_what_is_computed_in(keys, told):
    assert plan._precision(read_recipe(None, {"dtype": "float32", **keys})) == told


def test_a_cpu_does_not_compute_in_float16():
    assert plan._precision(read_recipe(None, {"dtype": "float32", "fp16": True}), on_cpu=True) == "float32"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"dataset_test_split": "val"}, ["dataset_test_split val is not read: eval_strategy is no"]),
        ({"dataset_test_split": "val", "eval_strategy": "epoch"}, []),
        (
            {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": 0}, "warmup_steps": 3},
            ["warmup_steps has no"],
        ),
        (
            {"lr_scheduler_type": "greedy", "learning_rate": 1e-4},
            ["lr_scheduler_type greedy never goes below its min_lr"],
        ),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, []),
        *(
            ({"lr_scheduler_type": kind, "lr_scheduler_kwargs": {name: value}, "learning_rate": 1e-4}, told)
            for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
            for name, value, told in (
                ("min_lr", 1e-5, []),
                (
                    "min_lr",
                    1e-3,
                    ["lr_scheduler_kwargs: min_lr 0.001 is above 0.0001, so that the learning rate rises"],
                ),
                ("min_lr_rate", 0.1, []),
                ("min_lr_rate", 2, ["lr_scheduler_kwargs: min_lr_rate 2 is above 1"]),
            )
        ),
    ],
)
def test_settings_that_cannot_mean_what_they_say_are_told(keys, told):
    found = plan_warnings.warnings(read_recipe(None, {"dtype": "float32", **keys}), [])
    assert [text[: len(start)] for text, start in zip(found, told, strict=True)] == told


@pytest.mark.parametrize(
    ("batch", "keys", "told"),
    [
        ({"rows": 5}, {}, ["a step takes 5 rows and there are 4"]),
        ({"rows": 4}, {"warmup_steps": 0.5}, []),
        ({"tokens": 41}, {}, ["global_batch_tokens 41 is above the 40 tokens"]),
        ({"rows": 4}, {"warmup_steps": 6}, ["warmup_steps 6 is no shorter than the run of 6 steps"]),
        ({"rows": 4}, {"warmup_steps": 6, "lr_scheduler_type": "greedy"}, []),
        ({"rows": 4}, {"eval_strategy": "steps", "eval_steps": 6}, []),
        ({"rows": 4}, {"eval_strategy": "steps", "eval_steps": 7}, ["eval_steps 7 is above the run's 6 steps"]),
        ({"rows": 4}, {"eval_strategy": "steps", "eval_steps": 0.5}, []),
        ({"rows": 4}, {"eval_strategy": "epoch", "eval_steps": 7}, []),
        (
            {"rows": 4},
            {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 5}},
            ["lr_scheduler_kwargs: num_"],
        ),
        ({"rows": 4}, {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 4}}, []),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_told(batch, keys, told):
    rows = Scan(range(4), np.arange(4), SimpleNamespace(tokens=np.full(4, 10)), [], [])
    run = SimpleNamespace(recipe=read_recipe(None, keys), global_batch=GlobalBatch(**batch))
    found = plan_warnings.warnings_of_data(run, SimpleNamespace(train=rows, steps=6))
    assert [text[: len(start)] for text, start in zip(found, told, strict=True)] == told


def test_what_a_cpu_has_nothing_for_is_idle():
    recipe = read_recipe(None, {"tf32": True, "activation_offloading": True, "bf16": True})
    assert plan_warnings.idle_on_cpu(recipe) == ["tf32", "activation_offloading"]
    assert plan_warnings.idle_on_cpu(read_recipe(None, {"tf32": False})) == []


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    recipe = read_recipe(write(tmp_path, "learning_rate: 2e-4\nmax_steps: 1e2\n"), {})
    assert recipe.get("learning_rate") == 2e-4
    assert recipe.get("max_steps") == 100


@pytest.mark.parametrize("number", ["1e-6", "1E5", "-.5e3", "1.e+2", "2.5e7", "1e05"])
def test_every_number_of_yaml_1_2_is_a_number_at_any_depth(number, tmp_path):
    path = write(tmp_path, f"learning_rate: 1\nlr_scheduler_kwargs: {{a: {number}, b: [{number}]}}\n")
    overrides = overrides_of(["--lr_scheduler_kwargs", f"{{a: {number}, b: [{number}]}}"])
    for recipe in (read_recipe(path, {}), read_recipe(None, overrides)):
        assert recipe.get("lr_scheduler_kwargs") == {"a": float(number), "b": [float(number)]}
        assert read_recipe(write(tmp_path, recipe.to_yaml()), {}).values() == recipe.values()


@pytest.mark.parametrize("word", ["e5", "1e", "1e5x", "a1e5", ".e3", "1e-", "1.2.3e4", "٣e٣"])
def test_what_is_no_number_stays_text(word):
    assert load_yaml(f"key: {word}") == {"key": word}


NAMES = ["2024_01_05", "1.10", "010", "0x1F", "1e5", "12345e7", "3:30:00", "2024-05-01", "1_000.5"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_looks_like_a_number_stays_as_it_is_written(name, tmp_path):
    keys = ("output_dir", "hub_revision", "run_name", "max_run_time")
    path = write(tmp_path, "".join(f"{key}: {name}\n" for key in keys))
    overrides = overrides_of([word for key in keys for word in (f"--{key}", name)])
    for recipe in (read_recipe(path, {}), read_recipe(None, overrides)):
        assert [recipe.values()[key] for key in keys] == [name] * len(keys)
        assert read_recipe(write(tmp_path, recipe.to_yaml()), {}).values() == recipe.values()


@pytest.mark.parametrize(("word", "told"), [("true", "True is not text"), ("[1, 2]", "is not text"), ("null", None)])
def test_what_is_no_name_is_not_made_one(word, told, tmp_path):
    overrides = overrides_of(["--run_name", word])
    for path, keys in ((write(tmp_path, f"run_name: {word}\n"), {}), (None, overrides)):
        if told is None:
            assert read_recipe(path, keys).get("run_name") is None
            continue
        with pytest.raises(UserError, match=told):
            read_recipe(path, keys)


def test_a_bare_no_is_the_choice_no(tmp_path):
    assert read_recipe(write(tmp_path, "eval_strategy: no\n"), {}).get("eval_strategy") == "no"


def test_a_date_is_text(tmp_path):
    assert read_recipe(write(tmp_path, "hub_revision: 2024-05-01\n"), {}).run.hub_revision == "2024-05-01"
    overrides = overrides_of(["--run_name", "2024-05-01"])
    assert overrides == {"run_name": "2024-05-01"}


def test_workers_are_kept_only_where_there_are_any():
    keep = {"dataloader_persistent_workers": True}
    assert read_recipe(None, {**keep, "dataloader_num_workers": 2}).get("dataloader_persistent_workers") is True
    assert read_recipe(None, keep).get("dataloader_persistent_workers") is False


def test_the_command_line_wins(tmp_path):
    recipe = read_recipe(write(tmp_path, "lora_r: 4\nseed: 1\n"), {"lora_r": 8})
    assert recipe.model.lora_r == 8
    assert recipe.get("seed") == 1


def test_a_revision_is_that_of_its_own_dataset(tmp_path):
    path = write(tmp_path, "dataset_name: me/charts\ndataset_revision: v2\n")

    def revision(**overrides):
        return read_recipe(path, overrides).data.dataset_revision

    assert revision() == revision(dataset_name="me/charts") == "v2"
    assert revision(dataset_name="me/others") is None
    assert revision(dataset_name="me/others", dataset_revision="v3") == "v3"


def test_every_problem_at_once(tmp_path):
    path = write(
        tmp_path,
        "learnin_rate: 1\nbf16: maybe\nseed: 1.5\npacking_strategy: bfd\nwarmup_ratio: 0.1\ndataset_format: coco\n",
    )
    with pytest.raises(UserError) as caught:
        read_recipe(path, {"lora_rr": 3})
    problems = caught.value.problems
    assert len(problems) == 7
    assert problems[0] == f"{path}: unknown key learnin_rate; did you mean learning_rate?"
    assert problems[1] == f"{path}: bf16: 'maybe' is not true or false"
    assert problems[2] == f"{path}: seed: 1.5 is not a whole number"
    assert "packing_strategy cannot be set" in problems[3]
    assert "write warmup_steps" in problems[4]
    formats = "auto, chartqa, messages, conversations, prompt_completion"
    assert problems[5] == f"{path}: dataset_format: 'coco' is not one of {formats}"
    assert problems[6] == "command line: unknown key lora_rr; did you mean lora_r?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nseed: 2\n", "is set twice, in lines 1 and 2"),
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("a: [1\n", "is not valid YAML"),
        ("system_message: {{text}}\n", "line 1: a key is a word; put text with braces or brackets between quotes"),
        ("? [a]\n: 1\n", "line 1: a key is a word"),
        ("seed: 1\nother: &x {a: 1}\nlr_scheduler_kwargs:\n  <<: *x\n", "line 4: merge keys .* write out the keys"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        read_recipe(write(tmp_path, text), {})


def test_a_missing_file_names_those_there_are(monkeypatch):
    monkeypatch.chdir(RECIPES[0].parents[1])
    with pytest.raises(UserError, match=r"recipe nowhere\.yaml does not exist; here are recipes/chartqa_lora\.yaml"):
        read_recipe("nowhere.yaml", {})


def test_yaml_cannot_make_objects():
    with pytest.raises(Exception, match="could not determine a constructor"):
        load_yaml("!!python/object/apply:os.system ['true']")


def test_command_line():
    words = "--recipe r.yaml --dataset_train_split train[:10%] --lora_target_modules q_proj v_proj --load_in_4bit --lora-r=8"
    options = parse(TrainOptions, [*words.split(), "--dry_run"])
    recipe, overrides = options.recipe, recipe_values(options.recipe_keys)
    assert recipe == "r.yaml"
    assert options.dry_run is True
    assert overrides == {
        "dataset_train_split": "train[:10%]",
        "lora_target_modules": ["q_proj", "v_proj"],
        "load_in_4bit": True,
        "lora_r": 8,
    }


def test_braces_on_the_command_line_are_text():
    overrides = overrides_of(["--system_message", "{{text}}", "--run_name", "Answer: yes"])
    assert overrides == {"system_message": "{{text}}", "run_name": "Answer: yes"}


def test_an_empty_value_on_the_command_line_is_empty_text():
    overrides = overrides_of(["--system_message", ""])
    assert overrides == {"system_message": ""}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("r.yaml", "'r.yaml' has no key before it"),
        ("--seed 1 --seed 2", "--seed is given twice"),
        ("--recipe a.yaml --recipe b.yaml", "--recipe is given twice"),
        ("--recipe a.yaml --config=b.yaml", "--recipe is given twice"),
        ("--recipe", "--recipe takes one file, not none"),
        ("--recipe a.yaml b.yaml", "--recipe takes one file, not a.yaml b.yaml"),
        ("--dry_run perhaps", "--dry_run: 'perhaps' is not true or false"),
        ("--dry_run true false", "--dry_run: .* is not true or false"),
    ],
)
def test_a_mistyped_command_line(words, told):
    with pytest.raises(UserError, match=f"^command line: {told}"):
        parse(TrainOptions, words.split())


@pytest.mark.parametrize(
    ("words", "on"),
    [("--dry_run", True), ("--dry-run true", True), ("--dry_run=True", True), ("--dry_run false", False), ("", False)],
)
def test_a_switch_takes_true_and_false_as_other_keys_do(words, on):
    assert parse(TrainOptions, words.split()) == TrainOptions(None, dry_run=on, recipe_keys={})


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        ("3", int, 3),
        (3, float, 3.0),
        ("true", bool, True),
        ("a, b", list[str], ["a", "b"]),
        ('{"a": 1}', dict, {"a": 1}),
    ],
)
def test_coerce(value, hint, wanted):
    assert coerce(value, hint) == wanted


def test_text_for_a_mapping_is_refused_as_no_mapping():
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs: 'num_cycles=2' is not a mapping$"):
        read_recipe(None, {"lr_scheduler_kwargs": "num_cycles=2"})
    assert read_recipe(None, {"lr_scheduler_kwargs": '{"a": 1}'}).get("lr_scheduler_kwargs") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "hint"), [(True, int), ("nan", float), (1, bool), ("x", dict), (True, str), ("inf", float)]
)
def test_coerce_refuses(value, hint):
    with pytest.raises(ValueError, match=r"^(is|cannot|fits)"):
        coerce(value, hint)


def test_a_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = read_recipe(RECIPES[0], {"output_dir": "x"})
    again = read_recipe(write(tmp_path, recipe.to_yaml()), {})
    assert again.values() == recipe.values()


@pytest.mark.parametrize("keys", [{}, {"bf16": None}, {"fp16": True}, {"bf16": False}, {"bf16": True}], ids=str)
def test_a_recipe_tells_the_bf16_that_runs(keys, tmp_path):
    recipe = read_recipe(None, keys)
    runs = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **keys).bf16
    assert recipe.get("bf16") is recipe.values()["bf16"] is runs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_have_only_known_keys_of_the_right_type(path):
    assert read_recipe(path, {}).training["output_dir"] == f"runs/{path.stem}"


def test_the_tutorials_numbers():
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "chartqa_qlora"), {})
    model = recipe.model
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules) == (
        8,
        16,
        0.05,
        ["q_proj", "v_proj"],
    )
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (True, "nf4", True)
    assert recipe.run.global_batch_size == 32
    wanted = {"learning_rate": 2e-4, "max_grad_norm": 0.3, "num_train_epochs": 3, "lr_scheduler_type": "constant"}
    assert {name: recipe.get(name) for name in wanted} == wanted


def test_a_model_in_the_home_folder_is_found_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for values in (
        read_recipe(write(tmp_path, "model_name_or_path: ~/models/x"), {}),
        read_recipe(None, {"model_name_or_path": "~/models/x"}),
    ):
        assert values.model.model_name_or_path == "/home/somebody/models/x"


def test_tables_of_keys_name_real_fields():
    from dataclasses import fields

    training = {entry.name for entry in fields(SFTConfig)}
    assert set(REFUSED_KEYS) <= training
    assert set(FIXED_TRAINING_ARGUMENTS) | set(TRAINING_DEFAULTS) <= training
    others = {*FORMER_KEYS, *WITHOUT_COUNTERPART}
    assert len(others) == len(FORMER_KEYS) + len(WITHOUT_COUNTERPART)
    assert not others & {*key_hints(), *REFUSED_KEYS}


def test_the_listed_keys_of_trl_are_those_of_the_installed_one():
    kinds = typing.get_type_hints(SFTConfig)
    assert [entry.name for entry in dataclasses.fields(SFTConfig)] == list(TRL_KEYS)
    for entry in dataclasses.fields(SFTConfig):
        kind, default = TRL_KEYS[entry.name]
        own = entry.default_factory() if callable(entry.default_factory) else entry.default
        assert default == getattr(own, "value", own), entry.name
        told = [(expected(k), is_text(k), type(None) in typing.get_args(k)) for k in (kind, kinds[entry.name])]
        assert told[0] == told[1] or entry.name in REFUSED_KEYS, entry.name


@pytest.mark.parametrize("text", FORMER_KEYS.values())
def test_what_is_written_instead_of_another_trainers_key_exists(text):
    first = text.partition(" ")[0].rstrip(",:")
    assert first in {*key_hints(), "nothing", "scripts/merge.py"}


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("cutoff_len", "write max_length"),
        ("micro_batch_size", "write per_device_train_batch_size"),
        ("sequence_len", "write max_length"),
        ("lora_target", r"write lora_target_modules \(lora_target_modules: all-linear for all\)"),
        ("template", "there is no such key here: the chat template comes with the model"),
        ("val_size", r"there is no such key here: no rows are split off; .*train\[:95%\]"),
        ("finetune_vision_layers", "write lora_scope: all"),
    ],
)
def test_a_key_of_another_trainer_is_told_ours(key, told, tmp_path):
    for path, keys in ((write(tmp_path, f"{key}: 1"), {}), (None, overrides_of([f"--{key}", "1"]))):
        with pytest.raises(UserError, match=f"unknown key {key}; {told}"):
            read_recipe(path, keys)


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "x" * 5000],
        ["--lora_r", *["12"] * 2000],
        ["--" + "k" * 5000, "1"],
        ["x" * 5000],
        ["--recipe", *["a"] * 3000],
        ["--dry_run", "y" * 5000],
    ],
)
def test_a_message_holds_200_characters_of_what_was_written(words):
    with pytest.raises(UserError) as caught:
        read_recipe(None, overrides_of(words))
    assert len(str(caught.value)) < 350


def test_a_long_value_in_a_file_is_shortened(tmp_path):
    for text in ("seed: " + "x" * 5000, "k" * 500 + ": 1", "[" * 3000, "max_length: [" + "1, " * 900 + "1]"):
        with pytest.raises(UserError) as caught:
            read_recipe(write(tmp_path, text), {})
        assert len(str(caught.value)) < 350 + len(str(tmp_path))


def test_a_runs_recipe_does_not_delete_again(tmp_path):
    recipe = read_recipe(None, {"overwrite_output_dir": True, "seed": 3})
    again = read_recipe(write(tmp_path, recipe.to_yaml()), {})
    assert (again.run.overwrite_output_dir, again.get("seed")) == (False, 3)


@pytest.mark.parametrize("name", ["torch_compile", "torch_compile_backend", "torch_compile_mode"])
def test_a_run_is_not_compiled(name):
    with pytest.raises(UserError, match=rf"{name} cannot be set: lengths and images differ .* see fused_kernels"):
        read_recipe(None, {name: "true"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_fits_80_columns(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80] == []


def test_help_names_our_keys_first():
    text = format_help(TrainOptions, "usage")
    assert text.index("--dataset_name") < text.index("--lora_scope") < text.index("--global_batch_size")
    assert text.index("--global_batch_size") < text.index("--learning_rate")
    assert "--packing_strategy " not in text


def test_the_embedded_model_of_an_installation_that_is_gone_is_found_in_this_one(tmp_path):
    gone = tmp_path / "qwen_vl_sft/tiny/assets/model"
    assert build({"model_name_or_path": str(gone)}).model.model_name_or_path == str(tiny.MODEL_DIR)
    gone.mkdir(parents=True)
    assert build({"model_name_or_path": str(gone)}).model.model_name_or_path == str(gone)


LONG_VALUES = ("/" + "x" * 700, "a b " * 300, f"{{{'x' * 700}: 1}}")
TAKE_LISTS = {"fused_kernels", "lora_modules_to_save", "lora_target_modules", "report_to"}


@pytest.mark.parametrize("key", sorted(text_keys() | TAKE_LISTS))
def test_no_message_on_a_key_holds_a_long_value(key, tmp_path):
    """Nor is there a traceback: a name may be too long for a file."""
    keys = {
        "model_name_or_path": "builtin:tiny-qwen2-vl",
        "dataset_name": "builtin:tiny-charts",
        "output_dir": str(tmp_path),
    }
    for value in LONG_VALUES:
        try:
            told = rules.problems_of(read_recipe(None, {**keys, key: value}), ALONE)
        except UserError as error:
            told = error.problems
        for problem in told:
            assert not re.search(r"x{200}|(a b ){50}", problem), problem[:300]


def test_an_error_shortens_a_long_word():
    assert str(UserError(f"model {'y' * 150} and {'x' * 900} do not fit")).endswith("... (900 characters) do not fit")
    assert "y" * 150 in str(UserError(f"model {'y' * 150} and {'x' * 900} do not fit"))
