"""check_packing.py tells packed rows that are computed as rows one at a time from those that are not, on a small model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from qwen_vl_sft.batching import packed_collator
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools.check_packing import problems_of

WORDS = [
    "--recipe",
    "recipes/quickstart.yaml",
    "--dataset_train_split",
    "train[:12]",
    "--dataset_test_split",
    "val[:4]",
]
WORDS += ["--rows", "4", "--tokens_per_batch", "512", "--load_in_4bit", "false", "--predict_with_generate", "false"]
PACKED = ["packed", "packed, shared"]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return what runs the script in this process, in float32: it gives the exit code, and the results by their rows."""

    def run(*words):
        line = [*WORDS, "--precisions", "float32", "--output_dir", str(tmp_path), *words]
        monkeypatch.setattr(sys, "argv", ["check_packing.py", *line])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("scripts/check_packing.py")["main"]()
        written = json.loads((tmp_path / "results.json").read_text())
        return ended.value.code, {result["rows"]: result for result in written["results"]}

    return run


def see_each_other(batch):
    batch |= {f"cu_seq_lens_{side}": torch.tensor([0, batch["input_ids"].shape[1]]).int() for side in "qk"}
    batch |= {f"max_length_{side}": batch["input_ids"].shape[1] for side in "qk"}
    batch.pop("kv_index", None)


def lose_their_positions(batch):
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["position_ids"])


def learn_another_token(batch):
    batch["shift_labels"] = batch["shift_labels"].roll(1, dims=1)


def test_rows_that_are_packed_right_end_with_code_0(check, capsys):
    code, found = check()
    assert code == 0
    assert list(found) == ["one at a time", "4 padded", *PACKED]
    assert all(result["gradient"] < 1e-5 and result["token_loss_largest"] < 1e-4 for result in found.values())
    table = capsys.readouterr().out
    assert "| float32   | plain   | packed, shared |" in table


@pytest.mark.parametrize("fault", [see_each_other, lose_their_positions, learn_another_token])
def test_rows_that_are_packed_wrong_end_with_code_1(fault, check, monkeypatch):
    joined = packed_collator.join

    def wrong(*args):
        batch = joined(*args)
        fault(batch)
        return batch

    monkeypatch.setattr(packed_collator, "join", wrong)
    code, found = check()
    assert code == 1
    assert found["4 padded"]["gradient"] < 1e-5
    assert all(found[name]["gradient"] > 1e-2 for name in PACKED)


@pytest.mark.parametrize(
    ("keys", "precisions", "told"),
    [
        ({"packing": False}, ("float32",), "--packing: all ways are compared"),
        ({"dtype": "float16"}, ("float32", "bfloat16"), "--dtype: --precisions bfloat16 sets it"),
        ({"load_in_4bit": False}, ("float32", "nf4"), "--load_in_4bit: --precisions nf4 sets it"),
        ({"lora_dropout": 0.1}, ("float32",), "--lora_dropout: the comparison needs 0.0"),
        ({"tf32": True}, ("float32",), "--tf32: the comparison needs false"),
        ({"load_in_4bit": False, "tf32": False, "lora_dropout": 0}, ("float32", "bfloat16"), None),
    ],
)
def test_keys_that_a_precision_sets_are_refused(keys, precisions, told):
    problems = [*problems_of(keys, precisions)]
    assert [problem[: len(told)] for problem in problems] == [told] if told else not problems


def test_a_contradiction_is_told_before_anything_is_made(tmp_path):
    from qwen_vl_sft.tools.check_packing import compare
    from qwen_vl_sft.tools.options import CheckPackingOptions

    folder = tmp_path / "out"
    options = CheckPackingOptions(
        recipe=Path("recipes/quickstart.yaml"), output_dir=folder, recipe_keys={"packing": ["false"]}
    )
    with pytest.raises(UserError, match="--packing"):
        compare(options)
    assert not folder.exists()
