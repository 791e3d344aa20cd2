"""The same rows are learned as the same tokens, in whatever form, order and number of files they are written."""

import csv
import gzip
import itertools
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.messages import BLUE, RED, write_messages
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder

# Texts that a reader which guesses would take for something else.
LOOKS = (
    "00501",
    "5.10",
    "1e5",
    "None",
    "NA",
    "nan",
    "null",
    "true",
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    "[1]",
    '{"a": 1}',
)
TEXTS = st.one_of(
    st.sampled_from(LOOKS),
    st.text(st.characters(codec="utf-8", exclude_characters="\0<>[]!|{}"), min_size=1, max_size=12),
).filter(str.strip)
ANSWERS = st.one_of(
    st.tuples(st.just("text"), st.lists(TEXTS, min_size=1, max_size=5)),
    st.tuples(st.just("integers"), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)),
    st.tuples(st.just("numbers"), st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5)),
)


def write_jsonl(rows, file):
    file.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_windows(rows, file):
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.with_suffix(".jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())


def write_gz(rows, file):
    file.with_suffix(".jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def write_list(rows, file):
    file.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_parquet(rows, file):
    pq.write_table(pa.Table.from_pylist(rows), file.with_suffix(".parquet"))


def write_categories(rows, file):
    table = pa.Table.from_pylist(rows)
    query = table.schema.get_field_index("query")
    if query >= 0:
        table = table.set_column(query, "query", table.column("query").dictionary_encode())
    pq.write_table(table, file.with_suffix(".parquet"), row_group_size=2)


def write_table(rows, file, suffix=".csv", separator=","):
    with file.with_suffix(suffix).open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0], delimiter=separator, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(rows, file):
    write_table(rows, file, ".tsv", "\t")


ANY_FORM = [write_jsonl, write_windows, write_gz, write_list, write_parquet, write_categories]


def learned(folder, encoder, streaming=False):
    """Return token ids and labels of each row, by its id."""
    rows = open_rows(str(folder), "train", streaming=streaming)
    found = {}
    for raw in rows.dataset:
        row = rows.encode(raw, encoder)
        found[int(raw["id"])] = (
            row.input_ids.tolist(),
            row.labels.tolist(),
            [image.content_hash for image in row.media],
        )
    return found


def write(rows, form, cuts, folder):
    write_messages(folder, [])
    (folder / "train.jsonl").unlink()
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = [rows[first:end] for first, end in itertools.pairwise(bounds)]
    for number, part in enumerate(parts):
        form(part, folder / (f"train-{number:05}-of-{len(parts):05}" if len(parts) > 1 else "train"))


@pytest.mark.parametrize("of_messages", [False, True])
@settings(max_examples=10)
@given(data=st.data())
def test_rows_are_learned_alike(of_messages, tiny_processor, data):
    encoder = Encoder(tiny_processor)
    kind, answers = data.draw(ANSWERS)
    queries = data.draw(st.lists(TEXTS, min_size=len(answers), max_size=len(answers)))
    rows = []
    for number, (query, answer) in enumerate(zip(queries, answers, strict=True)):
        image = RED if number % 2 else BLUE
        if of_messages:
            turns = [{"role": "user", "content": f"<image>{query}"}, {"role": "assistant", "content": str(answer)}]
            rows.append({"id": number, "messages": turns, "images": [image]})
        else:
            rows.append({"id": number, "image": image, "query": query, "label": answer})
    # In a table without types a number is the text that it was written as.
    tables = [] if of_messages or kind != "text" else [write_table, write_tsv]
    form = data.draw(st.sampled_from([*ANY_FORM, *tables]))
    order, cuts = data.draw(st.permutations(rows)), data.draw(st.sets(st.integers(1, 4), max_size=2))
    streaming = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        write(rows, write_jsonl, (), Path(folder) / "as written")
        write(order, form, cuts, Path(folder) / "other")
        wanted = learned(Path(folder) / "as written", encoder)
        assert len(wanted) == len(rows)
        assert learned(Path(folder) / "other", encoder, streaming) == wanted


def test_rows_saved_to_disk_are_learned_alike(tiny_processor, tmp_path):
    rows = [{"id": number, "image": RED, "query": text, "label": text} for number, text in enumerate(LOOKS)]
    write(rows, write_jsonl, (), tmp_path / "as written")
    write_messages(tmp_path / "saved", [])
    Dataset.from_list(rows[::-1]).save_to_disk(tmp_path / "saved")
    encoder = Encoder(tiny_processor)
    assert learned(tmp_path / "saved", encoder) == learned(tmp_path / "as written", encoder)
