#!/usr/bin/env bash
# datasets 5.2.0: once a column of a JSON or JSONL file holds values of several kinds, texts in it that can be read as JSON are: the
# answer "5.10" is the number 5.1, "007" is 7, "null" is None, and '{"total": 5.10}' a dict. Chats whose questions are lists of
# parts (an image, a text) and whose answers are texts are such a column. No error, no warning.
#
# Guess before it was run: a JSON string comes back as that text, whatever stands in other rows, as it does in a column of texts
# alone. (The type Json, which datasets gives a mixed column by itself, is for values of several kinds; text is one of them.)
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1): what the answers of a JSONL file come back as
#   written            texts alone        one other answer is a number   chat, questions are lists of parts
#   "red"              "red"              "red"                          "red"
#   "5.10"             "5.10"             5.1                            5.1
#   "007"              "007"              7                              7
#   "1e5"              "1e5"              100000.0                       100000.0
#   "true"             "true"             True                           True
#   "null"             "null"             None                           None
#   "[1, 2]"           "[1, 2]"           [1, 2]                         [1, 2]
#   '{"total": 5.10}'  '{"total": 5.10}'  {'total': 5.1}                 {'total': 5.1}
# The same when streamed, and with Dataset.from_list(..., on_mixed_types="use_json").
# Why: a value of the type Json is stored as it is when it can be read as JSON, and only else encoded; reading decodes all.
# Who is hurt: who fine-tunes on charts, receipts and forms, with numbers and JSON as answers, in the form of chats that Qwen's
# templates expect: figures lose their digits, and an answer in JSON is no text any more, so that a template that looks for
# text parts in it finds none.
# Way around: make every content a list of parts, answers too; or read the lines with Python's json and store each row as one text.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
cat > "$work/read.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
work = Path(sys.argv[1])
written = ["red", "5.10", "007", "1e5", "true", "null", "[1, 2]", '{"total": 5.10}']


def chat(answer, parts=False):
    shown = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    content = [{"type": "text", "text": answer}] if parts else answer
    return {"messages": [{"role": "user", "content": shown}, {"role": "assistant", "content": content}]}


def read(name, rows, **more):
    path = work / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(work / "cache"), **more)


def answers(rows):
    return [row["messages"][1]["content"] if "messages" in row else row["answer"] for row in rows][: len(written)]


plain, chats = [{"answer": answer} for answer in written], [chat(answer) for answer in written]
alone, mixed, turns = answers(read("alone", plain)), answers(read("mixed", [*plain, {"answer": 7}])), answers(read("chats", chats))
print(f"{'written':<20}{'texts alone':<20}{'one other is a number':<25}chat")
for row in zip(written, alone, mixed, turns):
    print(f"{row[0]!r:<20}{row[1]!r:<20}{row[2]!r:<25}{row[3]!r}")
also = [
    answers(read("streamed", chats, streaming=True)),
    answers(datasets.Dataset.from_list(chats, on_mixed_types="use_json")),
]
cured = [content[0]["text"] for content in answers(read("parts", [chat(answer, parts=True) for answer in written]))]
print("with answers as parts:", *map(repr, cured))
print("datasets", datasets.__version__)
changed = ["red", 5.1, 7, 100000.0, True, None, [1, 2], {"total": 5.1}]
stands = alone == cured == written and mixed == turns == also[0] == also[1] == changed
sys.exit(0 if stands else f"other than stated: {alone} {mixed} {turns} {also} {cured}")
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/read.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
