#!/usr/bin/env bash
# datasets 5.2.0: texts of a JSON or JSONL file come back in quotation marks, "red" for red, if the column is known as text and one
# other value of it, in the same file or block of 10 MiB, is a number, a boolean or a list. One such answer is enough for all texts
# of the file, questions too where they share the column. `map` and Dataset.from_generator do the same to texts that they write
# with a number in one batch of 1,000 rows, after a first batch of texts. No error, no warning.
#
# Guess before it was run: a column of texts with a stray number gives the number as text, or an error; the other rows do not
# depend on it. (Read without `features`, a small file comes back as it is: the column gets the type Json.)
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1): answers "red" and "blue", and where it says so the number 5
#                                                      red comes back as   texts in quotes
#   texts alone, features say text                     red                    0 of 2
#   one number                                         red                    0 of 2
#   one number, features say text                      "red"                  2 of 2
#   the same, streamed                                 "red"                  2 of 2
#   two files, the number in the second                "red"                  2 of 2   (the texts of the second file)
#   messages, one content is a number, with features   "What color?"          4 of 4   (questions and answers)
#   a file of 12 MiB, the last answer is a number      "answer 12693"      3006 of 15699   (from its second block on)
#   from_generator, a number after 1,500 texts         "red"                500 of 1500   (from the second batch on)
#   map, a number after 1,500 texts                    "red"                500 of 1500
# Why: a block whose values are of several types is stored as JSON (PR 8027, the type Json), each value encoded, and then cast to
# the text type that the features or an earlier block have set, without being decoded.
# Who is hurt: who fine-tunes on questions and answers of which some are numbers (charts, counts), exported from Python as they
# are: the model learns to answer, or to be asked, in quotation marks, and exact-match metrics count it as wrong.
# Way around: on_mixed_types=None, with which load_dataset raises an error instead; write every answer as text.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
cat > "$work/quotes.py" <<'PY'
import json
import sys
from pathlib import Path

import datasets
from datasets import Features, Value

datasets.disable_progress_bars()
work = Path(sys.argv[1])
text = {"features": Features({"answer": Value("string")})}
turns = {"features": Features({"messages": [{"role": Value("string"), "content": Value("string")}]})}


def write(name, rows):
    (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(work / name)


def answers(*values):
    return [{"answer": value} for value in values]


def chat(answer):
    return {"messages": [{"role": "user", "content": "What color?"}, {"role": "assistant", "content": answer}]}


def read(files, **more):
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work / "cache"), **more)
    found = []
    for row in rows:
        found += [turn["content"] for turn in row["messages"]] if "messages" in row else [row["answer"]]
    return found


texts, mixed = write("texts.jsonl", answers("red", "blue")), write("mixed.jsonl", answers("red", "blue", 5))
def generated():
    yield from answers(*["red"] * 1500, 5)


def mapped():
    rows = datasets.Dataset.from_dict({"number": list(range(1501))})
    return rows.map(lambda row: {"answer": "red" if row["number"] < 1500 else 5})


more = "what is told about the bar? " * 28
large = [{"question": more, "answer": f"answer {number}"} for number in range(15700)]
large[-1]["answer"] = 5
cases = {
    "texts alone, features say text": read(texts, **text),
    "one number": read(mixed)[:2],
    "one number, features say text": read(mixed, **text)[:2],
    "the same, streamed": read(mixed, streaming=True, **text)[:2],
    "two files, the number in the second": read([texts, mixed])[2:4],
    "messages, one content is a number, with features": read(write("chats.jsonl", [chat("red"), chat("blue"), chat(5)]), **turns)[:4],
    "a file of 12 MiB, the last answer is a number": read(write("large.jsonl", large))[:-1],
    "from_generator, a number after 1,500 texts": datasets.Dataset.from_generator(generated, cache_dir=str(work))["answer"][:-1],
    "map, a number after 1,500 texts": mapped()["answer"][:-1],
}
seen = {}
for name, found in cases.items():
    quoted = [value for value in found if str(value).startswith('"')]
    seen[name] = [len(quoted), len(found)]
    print(f"{name:<51}{(quoted or found)[0]:<20}{len(quoted):>5} of {len(found)}")
try:
    seen["refused"] = read(mixed, on_mixed_types=None, **text)
except datasets.exceptions.DatasetGenerationError:
    print("on_mixed_types=None: an error")
print("datasets", datasets.__version__)
*small, (late, rows), made, mapped_ = seen.values()
stands = small == [[0, 2], [0, 2], [2, 2], [2, 2], [2, 2], [4, 4]] and 0 < late < rows and made == mapped_ == [500, 1500]
sys.exit(0 if stands else f"other than stated: {seen}")
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/quotes.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
