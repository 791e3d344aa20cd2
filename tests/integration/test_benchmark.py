"""The scripts that measure: benchmark.py and benchmark_answers.py side by side, check_plan.py --measure run by run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.messages import conversation_row
from fixtures.models import SMALL_SHAPE
from fixtures.processes import run_process
from qwen_vl_sft import tiny
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.released import released_config
from qwen_vl_sft.planning.options import CheckPlanOptions
from qwen_vl_sft.tools import measure_plan
from qwen_vl_sft.tools.benchmark import FEWEST_ROWS, repeated, run_session
from qwen_vl_sft.tools.benchmark_answers import run_session as answer_session
from qwen_vl_sft.tools.compare_bases import compare, nudge, smoothed
from qwen_vl_sft.tools.compare_bases import run_session as compare_bases
from qwen_vl_sft.tools.options import AnswerBenchmarkOptions, BenchmarkOptions, CompareBasesOptions
from qwen_vl_sft.tools.settled_steps import TrainedStep, counting, have_settled


def test_no_rounds_are_refused_before_anything_is_made(tmp_path):
    words = ["--config", tiny.MODEL_DIR, "--rounds", "0", "--output_dir", tmp_path / "out"]
    finished = run_process("scripts/benchmark.py", *words)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1), finished.stderr
    assert "--rounds" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("trl,pakced", "unknown variant 'pakced'"),
        ("packed+fp4", r"unknown variant 'packed\+fp4'"),
        (" ,", "names none"),
    ],
)
def test_variants_are_read_before_anything_is_made(names, told, tmp_path):
    options = BenchmarkOptions(config="x", variants=names, rounds=1, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=f"--variants: {told}; known are trl, padded"):
        run_session(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bases", "told"), [(("bf16", "fp4"), "'fp4' is unknown"), (("fp8",), "one base has nothing to be compared with")]
)
def test_bases_are_read_before_anything_is_made(bases, told, tmp_path):
    with pytest.raises(UserError, match=f"--bases: {told}; name two or more of bf16, nf4, fp8"):
        compare_bases(CompareBasesOptions(bases=bases, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("session", "options", "told"),
    [
        (run_session, {"config": "x", "variants": "trl,packed+fp8", "rounds": 1}, "--variants packed+fp8 sets it"),
        (compare_bases, {"bases": ("nf4", "bf16"), "seeds": (0,)}, "--bases bf16 sets it"),
    ],
)
def test_keys_that_a_name_stands_for_are_refused_before_anything_is_made(session, options, told, tmp_path):
    kind = BenchmarkOptions if session is run_session else CompareBasesOptions
    own = kind(**options, output_dir=tmp_path / "out", recipe_keys={"load_in_4bit": ["true"]})
    with pytest.raises(UserError, match=re.escape(f"--load_in_4bit: {told}; leave it out")):
        session(own)
    assert not (tmp_path / "out").exists()


def test_the_seed_of_a_comparison_of_bases_is_refused(tmp_path):
    options = CompareBasesOptions(bases=("nf4", "bf16"), output_dir=tmp_path / "out", recipe_keys={"seed": ["3"]})
    with pytest.raises(UserError, match="--seed: --seeds sets it; leave it out"):
        compare_bases(options)


def test_losses_are_compared_as_means_of_steps_at_every_tenth():
    falling = [10.0 - step / 10 for step in range(30)]
    assert smoothed(falling)[:3] == [10.0, 9.95, 9.9]
    assert smoothed(falling)[-1] == pytest.approx(sum(falling[10:]) / 20)
    runs = [{"base": "bf16", "seed": seed, "losses": [2.0] * 30} for seed in (0, 1)]
    # A loss that is off for one step, then for good.
    runs.append({"base": "fp8", "seed": 1, "losses": [2.0] * 4 + [8.0] + [2.0] * 15 + [1.9] * 10})
    *references, found = compare(runs, "bf16")
    assert all("apart" not in one for one in references)
    assert (found["at_step"], found["apart"]) == (10, pytest.approx(0.3))
    assert found["apart_at_the_end"] == pytest.approx(-0.025)
    assert found["apart_at_steps"] == {10: pytest.approx(0.3), 20: pytest.approx(0.15), 30: pytest.approx(-0.025)}
    assert found["apart_on_average"] == pytest.approx(0.425 / 3)


def test_a_control_is_compared_with_the_same_base_not_nudged():
    runs = [{"base": "bf16", "seed": 0, "losses": [2.0] * 10}, {"base": "fp8", "seed": 0, "losses": [2.2] * 10}]
    control = {"base": "bf16", "seed": 0, "control": 1, "losses": [1.9] * 10}
    assert compare([*runs, control], "bf16")[:2] == compare(runs, "bf16")
    found = compare([runs[0], control, runs[1]], "bf16")[1]
    assert (found["base"], found["control"], found["apart"]) == ("bf16", 1, pytest.approx(-0.05))


def test_a_nudge_moves_trained_weights_alone_and_less_than_a_rounding_to_bfloat16():
    nudged = []
    for number in (1, 1, 2):
        model = torch.nn.Linear(64, 64)
        model.bias.requires_grad_(False)
        torch.nn.init.constant_(model.weight, 3.0)
        before = model.bias.clone()
        nudge(model, number)
        assert torch.equal(model.bias, before)
        nudged.append(model.weight.detach())
    one, again, two = nudged
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    apart = (one / 3 - 1).abs()
    # A bfloat16 has 8 significant bits: rounding to it moves a number by at most 2^-9 of itself.
    assert 0.9 * 2**-9 < float(apart.max()) <= 1.001 * 2**-9


def test_bases_are_trained_on_the_same_rows(tmp_path):
    """On a CPU in bfloat16 and in emulated FP8, from one adapter."""
    keys = {"per_device_train_batch_size": ["4"], "global_batch_size": ["4"]}
    options = CompareBasesOptions(
        recipe=Path("recipes/quickstart.yaml"),
        bases=("bf16", "emulation"),
        controls=1,
        steps=3,
        output_dir=tmp_path,
        recipe_keys=keys,
    )
    table = compare_bases(options)
    assert "emulation" in table
    written = json.loads((tmp_path / "results.json").read_text())
    assert [(run["base"], run.get("control")) for run in written["runs"]] == [
        ("bf16", None), ("bf16", 1), ("emulation", None),
    ]  # fmt: skip
    (plain, control, fp8) = (run["losses"] for run in written["runs"])
    assert len(plain) == len(control) == len(fp8) == 3
    # The first losses are those of an adapter that adds nothing yet.
    assert control[0] == plain[0]
    assert control[1:] != plain[1:]
    assert control == pytest.approx(plain, rel=0.02)
    assert fp8 == pytest.approx(plain, rel=0.1)
    assert fp8 != plain
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_rows_that_are_repeated_share_no_work(tiny_processor, messages_folder):
    rows, encoder = [conversation_row("<image>Which?"), conversation_row("<image>And now?")], Encoder(tiny_processor)
    again = repeated(scan(open_rows(str(messages_folder(rows)), "train"), encoder), 2)
    encoded = [again.rows.encode({"row": index}, encoder) for index in range(4)]
    one, two, three, four = (row.media[0].content_hash for row in encoded)
    assert one == two != three == four  # both rows show one image
    assert again.lengths.prefix[0] != again.lengths.prefix[2]
    assert again.rows.conversation({"row": 0}).media[0].content_hash == one


@pytest.mark.long
def test_ways_of_training_are_measured_on_rows_enough(tmp_path):
    words = [
        "--recipe",
        "recipes/quickstart.yaml",
        "--config",
        tiny.MODEL_DIR,
        "--variants",
        "trl,packed_plain,shared_cached",
    ]
    words += ["--rounds", "1", "--seconds", "1", "--use_cpu", "true", "--load_in_4bit", "false"]
    finished = run_process("scripts/benchmark.py", *words, "--max_train_samples", "64", "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    about = json.loads((tmp_path / "results.json").read_text())
    trl, packed, cached = about["results"]
    assert about["steps"]["trl"] * 4 >= FEWEST_ROWS
    assert (trl["variant"], trl["ratio"], packed["variant"]) == ("trl", 1.0, "packed_plain")
    assert packed["ratio"] == packed["rows_per_second"] / trl["rows_per_second"]
    # Without the vision tower there is less to compute for as many rows.
    assert cached["tflops"] / cached["rows_per_second"] < packed["tflops"] / packed["rows_per_second"]
    assert list((tmp_path / "runs" / "image_features").glob("*/*"))
    assert "| packed_plain  |" in finished.stdout
    assert (tmp_path / "speed.png").stat().st_size > 5_000


def test_ways_of_answering_are_measured_and_their_answers_compared(tmp_path, monkeypatch):
    keys = {"use_cpu": ["true"], "load_in_4bit": ["false"], "dataset_name": [str(tiny.DATA_DIR)]}
    options = AnswerBenchmarkOptions(
        config=str(tiny.MODEL_DIR), recipe=Path("recipes/quickstart.yaml"), output_dir=tmp_path, recipe_keys=keys,
        rows=5, new_tokens=4, long_rows=3, long_tokens=9, checked_rows=4, rounds=1, batch_size=2,
    )  # fmt: skip
    table = answer_session(options)
    assert table.splitlines()[0].split("|")[1:3] == [" work                  ", " variant "]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["work"] for result in results[::2]] == [
        "one question an image", "rows as they come", "three arms", "long answers", "predict_with_generate",
        "checked rows",
    ]  # fmt: skip
    assert [result["rows"] for result in results[::2]] == [5, 5, 15, 3, 5, 4]
    assert {result["compared_with"] for result in results} == {"padded", "transformers, one row at a time"}
    assert set(results[1]["parts"]) == {"tower", "prompts", "tokens"}
    assert results[1]["parts"]["tokens"]["seconds"] < results[1]["seconds"][0]
    assert {result["variant"] for result in results} == {"padded", "engine"}
    assert all(result["differing"] == 0 and result["rows_per_second"] > 0 for result in results)
    # Another answer would be noticed, with its margin.
    monkeypatch.setattr("qwen_vl_sft.tools.benchmark_answers._with_engine", lambda *_: {0: [1, 2]})
    monkeypatch.setattr("qwen_vl_sft.tools.benchmark_answers._padded", lambda *_: {0: [1, 3, 4]})
    answer_session(replace(options, works=("alone",), output_dir=tmp_path / "other"))
    _, other = json.loads((tmp_path / "other/results.json").read_text())["results"]
    assert (other["differing"], len(other["margins"])) == (1, 1)
    assert other["largest_margin"] > 0
    with pytest.raises(UserError, match="--variants: unknown engin; known are padded, engine, eager"):
        answer_session(replace(options, variants=("engin",)))
    with pytest.raises(UserError, match="--works: unknown al; known are alone"):
        answer_session(replace(options, works=("al",)))


def test_runs_for_plans_are_measured_with_the_sizes_of_what_they_computed(tmp_path, monkeypatch):
    """Qwen3-VL's patches are larger than those of the processor, which takes the model's side."""

    def small(name):
        config = released_config(name)
        vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64}
        config["vision_config"] |= {**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        config["text_config"] |= {**SMALL_SHAPE["text_config"], "head_dim": 16}
        return config

    monkeypatch.setattr(measure_plan, "released_config", small)
    keys = {
        "use_cpu": "true",
        "bf16": "false",
        "tf32": "false",
        "dataloader_num_workers": "0",
        "max_train_samples": "32",
    }
    keys |= {"dataset_name": str(tiny.DATA_DIR), "dataloader_persistent_workers": "false", "dataset_test_split": "test"}
    options = CheckPlanOptions(
        measure=tmp_path / "points.json", processor=str(tiny.MODEL_DIR), model_dir=tmp_path / "models",
        warmup=1, steps=1, most_steps=5, models=("Qwen3-VL-8B",),
        recipe_keys={name: [word] for name, word in keys.items()},
    )  # fmt: skip
    settings = (measure_plan.Setting(512), measure_plan.Setting(4096, share_prefixes=True, checkpointed=True))
    groups = [
        measure_plan.Group(f"Qwen/{model}-Instruct", method, settings)
        for model, method in (("Qwen3-VL-8B", "LoRA"), ("Qwen2-VL-2B", "LoRA"), ("Qwen3-VL-8B", "full"))
    ]
    assert not measure_plan.measure_points(options, groups)  # on a CPU plans tell nothing
    stored = json.loads((tmp_path / "points.json").read_text())
    assert not stored["failed"]
    assert not list((tmp_path / "models").glob("Qwen*"))
    one, all_layers, full, _ = stored["points"]
    assert (one["about"], all_layers["about"]) == ("packed 512", "shared 4,096, checkpointed")
    assert measure_plan.FIXED.about == "packed 16,384, segments of fixed sizes"
    assert (one["checkpointed"], all_layers["checkpointed"], full["checkpointed"]) == (0, 2, 0)
    assert one["rows"] == all_layers["rows"] == 16
    assert max(tokens for tokens, _, _ in one["batches"]) <= 512
    assert one["micro_batches"] > all_layers["micro_batches"] == 1
    assert one["step"][0] > all_layers["step"][0]  # prefixes are computed once
    assert full["step"] == one["step"]
    # The run has ended once its one step that counts has come.
    assert (one["settled"], one["counted"], len(one["each_step"])) == (True, [1], 2)
    assert 0 < one["start"] < 0.1
    assert one["seconds"] == pytest.approx(one["each_step"][1]["seconds"], abs=1e-4)
    assert (one["keys"]["use_peft"], full["keys"]["use_peft"]) == (True, False)
    with pytest.raises(UserError, match="--measure needs --processor"):
        measure_plan.measure_points(replace(options, processor=None))
    more = {name: [word] for name, word in (keys | {"load_in_4bit": "true", "tokens_per_batch": "4096"}).items()}
    with pytest.raises(UserError) as refused:
        measure_plan.measure_points(replace(options, recipe_keys=more), groups)
    assert "--load_in_4bit: --methods full sets it; leave it out, or name other methods" in str(refused.value)
    assert "--tokens_per_batch: each of the measured runs sets it; leave it out" in str(refused.value)


def _steps(seconds, planned=None, driver=None, epoch=100):
    planned, driver = planned or [1.0] * len(seconds), driver or [0] * len(seconds)
    told = zip(seconds, planned, driver, strict=True)
    return [
        TrainedStep(took, 0.0, plan, 1e-5, held, number % epoch == 0) for number, (took, plan, held) in enumerate(told)
    ]


def test_steps_that_begin_an_epoch_do_not_count():
    assert counting(_steps([1.0] * 6, epoch=4), warmup=1, counted=9) == [1, 2, 3, 5]
    assert counting(_steps([1.0] * 6, epoch=4), warmup=1, counted=3) == [2, 3, 5]
    assert counting(_steps([1.0] * 6, epoch=1), warmup=3, counted=9) == [3, 4, 5]  # there is no other
    assert counting(_steps([1.0] * 2), warmup=6, counted=6) == [1]


def test_steps_have_settled_when_the_last_ones_are_alike():
    alike = [3.0, 2.0, 1.0, 1.1, 1.02, 1.08]
    assert have_settled(_steps(alike), warmup=2, counted=4)
    assert not have_settled(_steps(alike), warmup=1, counted=5)  # the first two take longer than the last three
    assert not have_settled(_steps(alike), warmup=3, counted=4)  # there are three
    assert not have_settled(_steps([1.0, 1.0]), warmup=2, counted=1)
    # What counts is the time as a share of the plan's: rows differ.
    assert have_settled(_steps([1.0, 1.0, 1.0, 2.0, 2.0], planned=[1.0, 1.0, 1.0, 2.0, 2.0]), warmup=1, counted=4)
    assert not have_settled(_steps([1.0, 1.0, 1.0, 2.0, 2.0]), warmup=1, counted=4)
    # To get memory from the driver takes time.
    assert have_settled(_steps([1.0] * 5, driver=[0, 0, 2**30, 2**30, 2**30]), warmup=1, counted=2)
    assert not have_settled(_steps([1.0] * 5, driver=[0, 0, 2**30, 2**30, 2**30]), warmup=1, counted=3)
