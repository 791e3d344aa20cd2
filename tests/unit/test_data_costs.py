"""What data cost is measured on made-up data that the package reads, in commands that its scripts take."""

import json

import pytest

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools import data_costs
from qwen_vl_sft.tools.made_up_data import chart, write_charts, write_conversations
from qwen_vl_sft.tools.options import DataCostsOptions
from qwen_vl_sft.training.options import TrainOptions


def options(folder, *words):
    return parse(DataCostsOptions, ["--output_dir", str(folder), *words])


def test_made_up_rows_are_good(tmp_path, tiny_processor):
    talk = scan(
        open_rows(str(write_conversations(tmp_path / "talk", 12, 3, (80, 80))), "train"), Encoder(tiny_processor)
    )
    assert talk.lengths.images.tolist() == [1] * 12
    assert len(set(talk.lengths.tokens.tolist())) > 6
    questions = scan(open_rows(str(write_charts(tmp_path / "charts", 5)), "train"), Encoder(tiny_processor))
    assert len(questions.rows) == 5
    assert chart(850, 600, 1) == chart(850, 600, 1) != chart(850, 600, 2)


def test_what_one_process_does_is_measured(tmp_path, capsys):
    table = data_costs.measure(options(tmp_path, "--parts", "turns,planning"))
    lines = table.splitlines()
    assert len(lines) == 2 + len(data_costs.TURNS) + 2
    assert "| token ids of a conversation of 40 turn(s)" in table
    assert capsys.readouterr().out.count("\n") == len(lines) - 2
    stored = json.loads((tmp_path / "data_costs.json").read_text())
    assert all(result["milliseconds"] > 0 for result in stored["results"])


def test_versions_start_in_turns_with_words_that_the_script_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(data_costs, "START_ROWS", (20,))
    started = []

    def run(command, checkout, cache):
        started.append((command, checkout, cache))
        return {"seconds": 1.0, "cpu_seconds": 2.0, "peak_mib": 3.0}

    monkeypatch.setattr(data_costs, "_run", run)
    folders = options(
        tmp_path / "out", "--parts", "starts,large", "--rows", "4", "--images", "2", "--before", str(tmp_path)
    )
    table = data_costs.measure(folders)
    assert [checkout == tmp_path for _, checkout, _ in started] == [False, True] * 4 + [False] * 2
    assert len({cache for _, _, cache in started}) == 5
    assert "second start, 20 rows of JSON lines" in table
    for command, checkout, _ in started:
        words = command[command.index("scripts/sft.py") + 1 :]
        assert parse(TrainOptions, words).recipe == "recipes/quickstart.yaml"
        assert checkout == tmp_path or (checkout / "scripts/sft.py").is_file()


def test_a_run_that_fails_is_told_with_its_output(tmp_path):
    with pytest.raises(UserError, match=r"the run has failed; its output is in .*cache\.log"):
        data_costs._run(["false"], tmp_path, tmp_path / "cache")
    told = data_costs._run(["true"], tmp_path, tmp_path / "cache")
    assert told["peak_mib"] > 0


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(UserError, match="--parts: turn is unknown; choose from starts, large, worker, turns, planning"):
        data_costs.measure(options(tmp_path, "--parts", "turn"))
