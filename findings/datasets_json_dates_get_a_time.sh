#!/usr/bin/env bash
# datasets 5.2.0: texts of a JSON or JSONL file that all look like ISO dates do not come back as they are, even where the column is
# known as text: "2024-03-01" is "2024-03-01 00:00:00", and "2024-03-01T10:00:00+02:00" is "2024-03-01 08:00:00", another hour
# without its zone. It happens when all values of a file, or of a block of 10 MiB, are such texts. No error, no warning.
#
# Guess before it was run: a JSON string is a text, and with features that say Value("string") or after a first file of texts it
# stays the text that it is, as one other text in the file makes it, and as CSV files and Dataset.from_list do.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1): two answers, the first of them
#                                        2024-03-01            2024-03-01T10:00:00+02:00
#   JSONL, features say text             2024-03-01 00:00:00   2024-03-01 08:00:00
#   the same, streamed                   2024-03-01 00:00:00   2024-03-01 08:00:00
#   JSONL, after a file of other texts   2024-03-01 00:00:00   2024-03-01 08:00:00
#   JSONL alone                          datetime              datetime
#   JSONL, one answer is "none"          2024-03-01            2024-03-01T10:00:00+02:00
#   CSV                                  2024-03-01            2024-03-01T10:00:00+02:00
# Why: each block goes through pyarrow's JSON reader, which makes timestamps of such texts; the table is then cast back to text.
# Who is hurt: who fine-tunes on forms, receipts and tables, with one file for each kind of question ("What is the date?"): the
# model learns a midnight that no picture shows, and exact-match metrics count right answers as wrong.
# Way around: read the lines with Python's json and Dataset.from_list, or store the rows as Parquet.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
cat > "$work/dates.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets
from datasets import Features, Value

datasets.disable_progress_bars()
work = Path(sys.argv[1])
text = {"features": Features({"answer": Value("string")})}


def write(name, answers):
    lines = ["answer", *answers] if name.endswith("csv") else [json.dumps({"answer": answer}) for answer in answers]
    (work / name).write_text("\n".join(lines) + "\n")
    return str(work / name)


def read(files, row=0, **more):
    kind = "csv" if str(files).endswith("csv") else "json"
    rows = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(work / "cache"), **more)
    found = list(rows)[row]["answer"]
    return found if isinstance(found, str) else type(found).__name__


seen = {}
for number, (first, second) in enumerate(
    [("2024-03-01", "2023-12-31"), ("2024-03-01T10:00:00+02:00", "2023-12-31T23:30:00+02:00")]
):
    others, dates = write(f"others{number}.jsonl", ["red", "blue"]), write(f"dates{number}.jsonl", [first, second])
    found = {
        "JSONL, features say text": read(dates, **text),
        "the same, streamed": read(dates, streaming=True, **text),
        "JSONL, after a file of other texts": read([others, dates], row=2),
        "JSONL alone": read(dates),
        'JSONL, one answer is "none"': read(write(f"one{number}.jsonl", [first, second, "none"])),
        "CSV": read(write(f"dates{number}.csv", [first, second])),
    }
    assert datasets.Dataset.from_list([{"answer": first}])[0]["answer"] == first
    for name, answer in found.items():
        seen.setdefault(name, []).append(answer)
for name, answers in seen.items():
    print(f"{name:<37}{answers[0]:<22}{answers[1]}")
print("datasets", datasets.__version__)
changed, kept = ["2024-03-01 00:00:00", "2024-03-01 08:00:00"], ["2024-03-01", "2024-03-01T10:00:00+02:00"]
sys.exit(0 if list(seen.values()) == [changed] * 3 + [["datetime"] * 2] + [kept] * 2 else f"other than stated: {seen}")
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/dates.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
