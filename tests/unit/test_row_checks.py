"""What is found in rows is kept on disk: nothing that is as it was is looked at again, and whatever changed is."""

import copy
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import trl

from fixtures.messages import RED, conversation_row, png
from qwen_vl_sft import cpu_cores, tiny
from qwen_vl_sft.data import row_checks
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.row_checks import Checks, check_rows
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import UserError

IMAGES = ("images/red.png", "images/blue.png")
ROWS = [conversation_row(f"<image>Is it {number}?", images=[IMAGES[number % 2]]) for number in range(6)]


@pytest.fixture
def encoder(tiny_processor):
    return Encoder(tiny_processor)


@pytest.fixture
def looked_at(monkeypatch):
    """Return the places of the rows that are looked at from now on."""
    places, look = [], row_checks._check_row
    monkeypatch.setattr(
        row_checks, "_check_row", lambda rows, place, *others: places.append(place) or look(rows, place, *others)
    )
    return places


def check(folder, encoder, processes=None):
    return check_rows(open_rows(str(folder), "train"), Checks(encoder, decode=True, content_hashes=True), processes)


def test_rows_are_looked_at_once(messages_folder, encoder, looked_at):
    folder = messages_folder(ROWS)
    first = check(folder, encoder)
    assert looked_at == [0, 1, 2, 3, 4, 5]
    assert check(folder, encoder).equals(first)
    assert len(looked_at) == 6
    check_rows(open_rows(str(folder), "train"), Checks(encoder, decode=False, content_hashes=True))
    assert len(looked_at) == 12


def test_what_was_found_with_content_hashes_serves_without(messages_folder, encoder, looked_at):
    folder = messages_folder(ROWS)
    rows = open_rows(str(folder), "train")
    plain = Checks(encoder, decode=True, content_hashes=False)
    full = check(folder, encoder)
    assert check_rows(rows, plain).equals(full)
    assert len(looked_at) == 6
    (folder / IMAGES[0]).write_bytes(png("green"))
    changed = check_rows(rows, plain)
    assert looked_at[6:] == [0, 2, 4]
    assert check(folder, encoder).equals(changed)
    assert len(looked_at) == 9
    assert len(set(full["question"].to_pylist()) | set(changed["question"].to_pylist())) == 9


def test_a_row_that_is_too_long_has_its_lengths(messages_folder, tiny_processor):
    folder = messages_folder([*ROWS, conversation_row("<image>Is it " + "very " * 30 + "red?")])
    everything = check(folder, Encoder(tiny_processor))
    longest = max(everything["tokens"].to_pylist())
    found = check(folder, Encoder(tiny_processor, max_length=longest - 1))
    assert found["overlong"].to_pylist() == [False] * 6 + [True]
    assert found.drop_columns(["problem", "overlong"]).equals(everything.drop_columns(["problem", "overlong"]))
    assert everything["image_sides"].to_pylist() == [[56, 56]] * 7
    assert everything["answer_tokens"].equals(everything["target_tokens"])


def test_rows_of_a_file_that_changed_are_looked_at_again(messages_folder, encoder, looked_at):
    folder = messages_folder(ROWS)
    first = check(folder, encoder)
    blue = folder / IMAGES[1]
    blue.write_bytes(png("green", (112, 56)))
    looked_at.clear()
    second = check(folder, encoder)
    assert looked_at == [1, 3, 5]
    assert second["patches"].to_pylist() == [16, 32] * 3
    assert second["content_hashes"].to_pylist()[::2] == first["content_hashes"].to_pylist()[::2]
    assert check(folder, encoder).equals(second)
    times = blue.stat()
    os.utime(blue, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    check(folder, encoder)
    assert looked_at == [1, 3, 5] * 2
    blue.unlink()
    assert [problem is None for problem in check(folder, encoder)["problem"].to_pylist()] == [True, False] * 3
    looked_at.clear()
    check(folder, encoder)
    assert looked_at == []
    blue.write_bytes(png())
    assert check(folder, encoder)["problem"].null_count == 6
    assert looked_at == [1, 3, 5]


def test_a_row_whose_image_leads_nowhere_is_looked_at_at_every_start(messages_folder, encoder, looked_at):
    folder = messages_folder([*ROWS, conversation_row(images=["elsewhere/red.png"])])
    (folder / "elsewhere").symlink_to("elsewhere")
    assert "elsewhere" in check(folder, encoder)["problem"].to_pylist()[6]
    (folder / "elsewhere").unlink()
    (folder / "elsewhere").symlink_to("images")
    looked_at.clear()
    assert check(folder, encoder)["problem"].to_pylist() == [None] * 7
    assert looked_at == [6]


def test_changed_rows_are_looked_at(messages_folder, encoder, looked_at):
    folder = messages_folder(ROWS)
    check(folder, encoder)
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes"}]}\n')
    found = check(folder, encoder)
    assert len(looked_at) == 13
    assert found["images"].to_pylist() == [1] * 6 + [0]


def test_half_a_file_of_findings_is_made_anew(messages_folder, encoder, looked_at, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = messages_folder(ROWS)
    first = check(folder, encoder)
    (kept,) = (tmp_path / "cache/qwen_vl_sft_scans").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert check(folder, encoder).equals(first)
    assert looked_at == [*range(6)] * 2


def test_an_image_that_many_rows_show_is_decoded_once(messages_folder, encoder, monkeypatch):
    decoded, decode = [], ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda file: decoded.append(file.path or file.data) or decode(file))
    broken = [conversation_row(images=["images/broken.png"])] * 3
    folder = messages_folder([*ROWS, *broken, *[conversation_row(images=[RED])] * 3])
    (folder / "images/broken.png").write_bytes(png()[:60])
    found = check(folder, encoder)
    assert len(decoded) == 3
    assert found["problem"].to_pylist()[6:9] == [found["problem"].to_pylist()[6]] * 3
    assert "broken.png cannot be" in found["problem"].to_pylist()[7]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_finds_the_same(processes, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(row_checks, "_PIECE", 7)
    rows = open_rows(str(tiny.DATA_DIR), "val", max_rows=60)
    lengths = scan(rows, encoder, num_proc=processes).lengths
    assert lengths.tokens.tolist() == [len(rows.encode({"row": place}, encoder).input_ids) for place in range(60)]
    assert np.unique(lengths.prefix).tolist() == list(range(lengths.prefix.max() + 1))
    assert lengths.prefix[0] == 0


def test_an_error_for_the_user_comes_out_of_a_process_as_it_is(messages_folder, tiny_processor):
    processor = copy.copy(tiny_processor)
    processor.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3_5_think.jinja").read_text()
    turn = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "<think>I am.</think>yes"}]
    folder = messages_folder([{"messages": turn * 2}] * 4)
    with pytest.raises(UserError, match=r"^the processor's chat template writes an answer otherwise"):
        check(folder, Encoder(processor), processes=2)


def test_a_process_that_is_killed_is_told(messages_folder, encoder, monkeypatch):
    monkeypatch.setattr(row_checks, "_check_row", lambda *arguments: os.kill(os.getpid(), 9))
    with pytest.raises(
        UserError, match="has ended, most likely because memory ran out; set dataset_num_proc to less than 2"
    ):
        check(messages_folder(ROWS), encoder, processes=2)


def test_a_container_has_no_more_cores_than_its_share(tmp_path, monkeypatch):
    bound = len(os.sched_getaffinity(0))
    for text, cores in (("max 100000", bound), ("50000 100000", 1), ("9900000 100000", bound), ("nonsense", bound)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(cpu_cores, "_CPU_QUOTA", tmp_path / "cpu.max")
        assert cpu_cores.usable_cores() == cores
