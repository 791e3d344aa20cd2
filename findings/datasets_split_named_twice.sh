#!/usr/bin/env bash
# datasets 5.2.0: a file whose folders name its split twice, as in COCO's layout (train/train2017/..., val/val2017/...), is
# listed twice, and load_dataset gives each of its rows twice: no error, no warning. The same files under train/2017/ are
# read once.
#
# Guess before it was run: a split is a set of files, so a file counts once however many of the patterns fit its name.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1):
#   train/2017/rows.parquet       rows of train: ['a', 'b']
#   train/train2017/rows.parquet  rows of train: ['a', 'b', 'a', 'b']
#   train/train_part/rows.csv     rows of train: ['a', 'b', 'a', 'b']
# Why: the patterns **/train/** and **/train[-._ 0-9]*/** are both resolved, and their results are joined. The duplicates
# that were reported for train/train.parquet (huggingface/datasets issue 6272) came from a pattern of folders and one of
# files, which are told apart since; two patterns of folders are not.
# Who is hurt: rows count double in training, and a score over such a split repeats each answer.
# Way around: pass data_files explicitly, or take the split's word out of the inner folder's name.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
work, seen = Path(sys.argv[1]), []
for number, name in enumerate(("train/2017/rows.parquet", "train/train2017/rows.parquet", "train/train_part/rows.csv")):
    path = work / f"data{number}" / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".csv":
        path.write_text("answer\na\nb\n")
    else:
        pq.write_table(pa.table({"answer": ["a", "b"]}), path)
    seen.append(list(datasets.load_dataset(str(work / f"data{number}"), split="train")["answer"]))
    print(f"{name:<29} rows of train: {seen[-1]}")
print("datasets", datasets.__version__)
sys.exit(f"other than stated: {seen}" if seen != [["a", "b"], ["a", "b"] * 2, ["a", "b"] * 2] else 0)
PY
