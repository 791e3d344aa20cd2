#!/usr/bin/env bash
# datasets 5.2.0: a local folder whose README.md names its data files (`configs:`) is cached under the folder's own name
# and the text of that README alone. Another folder of the same name and README, and the same folder after its rows have
# changed, are answered with the rows that were read first: no error, no warning.
#
# Guess before it was run: the cache depends on the path and on the files (size, time or content), as it does when the
# same folder has no README.md, so each of the three calls reads the rows that lie there.
#
# Seen (Python 3.11, Linux, datasets 5.2.0, pyarrow 26.0.1):
#   with README.md     first: red    other folder: red    after the change: red
#   without README.md  first: red    other folder: blue   after the change: green
# Who is hurt: two exports kept as run1/data and run2/data; an export that is written anew in place.
# Way around: pass data_files explicitly, or another `description` for each state of the folder, which counts in the name.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, about 200 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"


def write(folder, answer, readme):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(json.dumps({"answer": answer}) + "\n")
    if readme:
        (folder / "README.md").write_text(README)


def read(folder):
    return datasets.load_dataset(str(folder), split="train")[0]["answer"]


work, seen = Path(sys.argv[1]), {}
for readme in (True, False):
    place = work / ("with" if readme else "without")
    one, other = place / "monday" / "charts", place / "tuesday" / "charts"
    write(one, "red", readme)
    write(other, "blue", readme)
    answers = [read(one), read(other)]
    write(one, "green", readme)
    answers.append(read(one))
    seen[readme] = answers
    print(f"{'with' if readme else 'without'} README.md  first: {answers[0]}  other folder: {answers[1]}  after the change: {answers[2]}")
print("datasets", datasets.__version__)
expected = {True: ["red", "red", "red"], False: ["red", "blue", "green"]}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
