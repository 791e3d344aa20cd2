#!/usr/bin/env bash
# datasets 5.2.0: of rows in .tar archives (WebDataset), the first five samples say what the JSON of all others may hold. Later values
# are made to fit: 3.7 is 3 where the first five answers were whole numbers, a box of 12.5 and 80.9 is one of 12 and 80, the number
# 5 is True after five booleans, and keys that the first five do not have are gone. No error, no warning, streamed or not.
#
# Guess before it was run: values come back as they were written, as from the same rows in one JSONL file, or an error says that
# they do not fit, as it does for a text after five numbers.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1), six samples of the first kind and four of the second:
#   written, first / later                                  later ones read, .tar     later ones read, JSONL
#   {"answer": 3} / {"answer": 3.7}                         {"answer": 3}             {"answer": 3.7}
#   {"box": [10, 20]} / {"box": [12.5, 80.9]}               {"box": [12, 80]}         {"box": [12.5, 80.9]}
#   {"seen": true} / {"seen": 5}                            {"seen": true}            {"seen": 5}
#   {"text": "a"} / {"text": "b", "box": [1, 2]}            {"text": "b"}             {"text": "b", "box": [1, 2]}
#   {"answer": 3} / {"answer": "red"}                       an error                  {"answer": "red"}
# (Issue 7549 is another effect: a null in the first five ends in an error.)
# Who is hurt: who fine-tunes on large sets of images packed as WebDataset: rounded numbers as right answers, boxes that are cut,
# and columns that only some samples have.
# Way around: pass `features`, as below; then numbers are right and keys are kept (null where a sample has none).
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
cat > "$work/shards.py" <<'PY'
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets
from datasets import Features, List, Value

datasets.disable_progress_bars()
work = Path(sys.argv[1])


def write(name, samples):
    (work / f"{name}.jsonl").write_text("".join(json.dumps({"json": sample}) + "\n" for sample in samples))
    with tarfile.open(work / f"{name}.tar", "w") as archive:
        for number, sample in enumerate(samples):
            data, member = json.dumps(sample).encode(), tarfile.TarInfo(f"{number:04d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def last(kind, path, **more):
    try:
        rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(work / "cache"), **more))
    except (datasets.exceptions.DatasetGenerationError, ValueError):
        return "an error"
    return json.dumps({key: value for key, value in rows[-1]["json"].items() if value is not None})


seen = {}
for name, (first, later) in {
    "fraction": ({"answer": 3}, {"answer": 3.7}),
    "box": ({"box": [10, 20]}, {"box": [12.5, 80.9]}),
    "boolean": ({"seen": True}, {"seen": 5}),
    "key": ({"text": "a"}, {"text": "b", "box": [1, 2]}),
    "text": ({"answer": 3}, {"answer": "red"}),
}.items():
    write(name, [first] * 6 + [later] * 4)
    archive = work / f"{name}.tar"
    seen[name] = [last("webdataset", archive), last("webdataset", archive, streaming=True), last("json", work / f"{name}.jsonl")]
    seen[name].append(json.dumps(later))
    print(f"{json.dumps(first) + ' / ' + json.dumps(later):<54}{seen[name][0]:<24}{seen[name][2]}")


def with_features(name, **columns):
    kept = {"__key__": Value("string"), "__url__": Value("string"), "json": columns}
    return last("webdataset", work / f"{name}.tar", features=Features(kept))


cured = [
    with_features("box", box=List(Value("float64"))),
    with_features("key", text=Value("string"), box=List(Value("int64"))),
]
print("with features:", *cured)
print("datasets", datasets.__version__)
*cut, text = seen.values()
wanted = ['{"answer": 3}', '{"box": [12, 80]}', '{"seen": true}', '{"text": "b"}']
stands = [found[0] for found in cut] == [found[1] for found in cut] == wanted and text[:2] == ["an error"] * 2
right = all(found[2] == found[3] for found in seen.values()) and cured == [seen["box"][3], seen["key"][3]]
sys.exit(0 if stands and right else f"other than stated: {seen} {cured}")
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/shards.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
