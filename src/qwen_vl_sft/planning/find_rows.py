"""Find the sizes of training rows: from the last check of the same data, else from a sample of its files, else assumed.

A sample reads the headers of images, and counts tokens of text by its characters.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.families.shape import VisionShape
from qwen_vl_sft.planning.rows import ASSUMED, RowSizes, assumed_sizes

SAMPLED = 200
# Pixel limits of the processors of Qwen2-VL and Qwen2.5-VL, and of Qwen3-VL.
PIXELS = {14: (56 * 56, 28 * 28 * 16384), 16: (65536, 16777216)}
_CHARACTERS_A_TOKEN = 4.0
# Of a conversation's turns in the chat template, and of a system message where there is none.
_TEMPLATE_TOKENS = 30
# More for the system message that a format or a dataset of this name brings; read without the libraries that rows need.
_SYSTEM_TOKENS = {"chartqa": 93}
_IMAGE_COLUMNS = re.compile(r"images?|picture|photo|figure|chart|media|file_name", re.I)
_NO_TEXT = re.compile(r"^(id|.*_id|type|role|from|path|file_name|url|source|split|human_or_machine)$", re.I)
_ANSWER = re.compile(r"answers?|label|response|output|completion|chosen", re.I)


def row_sizes(data: DataSettings, model: str, vision: VisionShape) -> RowSizes:
    """Return the sizes of a recipe's training rows."""
    found = remembered_sizes(data, model) or sample(data, vision)
    if found is None:
        rows = _sliced(ASSUMED.rows, data.dataset_train_split)
        found = assumed_sizes(vision, data.min_pixels, data.max_pixels)
        found = replace(found, rows=min(rows, data.max_train_samples or rows))
    return found


def remember_sizes(data: DataSettings, model: str, found: RowSizes) -> None:
    """Keep what a check of all rows has measured, for plans of the same data; without a cache folder nothing is kept."""
    try:
        path = _place(data, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(asdict(found), indent=1) + "\n")
    except OSError:
        return


def remembered_sizes(data: DataSettings, model: str) -> RowSizes | None:
    """Return what `remember` kept for the same data, None where there is nothing."""
    try:
        found = RowSizes(**json.loads(_place(data, model).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return replace(found, source="measured when the rows were last checked")


def _place(data: DataSettings, model: str) -> Path:
    """Return the file for the sizes of this data: another one once the data's files have changed."""
    keys = asdict(data)
    for irrelevant in ("dataset_num_proc", "verify_images", "bad_rows", "max_eval_samples", "dataset_test_split"):
        keys.pop(irrelevant, None)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(data)[:1000]]
    text = json.dumps([keys, model, files], sort_keys=True, default=str)
    # Beside the checked rows themselves, which `datasets` keeps.
    home = os.environ.get("HF_DATASETS_CACHE") or str(_hub_home() / "datasets")
    return Path(home).expanduser() / "qwen_vl_sft_row_sizes" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def sample(data: DataSettings, vision: VisionShape) -> RowSizes | None:
    """Read some rows of the split's files on this machine; None where there are none that can be read."""
    files = _files(data)
    try:
        found = _Sample(data, vision, files)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    return found.sizes() if found.read else None


def _files(data: DataSettings) -> list[Path]:
    """Return the parquet and JSON files of the training split on this machine: local ones, or those of the Hub's cache."""
    split = data.dataset_train_split.split("[")[0]
    path = Path(str(data.dataset_name)).expanduser()
    if path.is_file():
        return [path]
    roots = [path] if path.is_dir() else _hub_snapshots(str(data.dataset_name))
    # Only where data files are by custom: other folders may hold a million images.
    places = [place for root in roots for place in (root, root / "data", root / (data.dataset_config or "default"))]
    kinds = ("parquet", "jsonl", "json")
    files = [file for place in places for kind in kinds for file in sorted(place.glob(f"*.{kind}"))]
    return [file for file in files if re.match(rf"{re.escape(split)}([-._]|$)", file.stem)]


def _hub_snapshots(name: str) -> list[Path]:
    hub = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")
    snapshots = hub / f"datasets--{name.replace('/', '--')}" / "snapshots"
    return sorted(snapshots.iterdir())[-1:] if snapshots.is_dir() else []


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


class _Sample:
    """Sizes of a few rows, evenly spread over the files."""

    def __init__(self, data: DataSettings, vision: VisionShape, files: Sequence[Path]) -> None:
        self.vision = vision
        least, most = PIXELS.get(vision.patch, PIXELS[14])
        self.limits = data.min_pixels or least, data.max_pixels or most
        self.folder = files[0].parent if files else Path()
        self.rows = sum(map(_count_rows, files))
        self.read: list[tuple[float, float, list[int]]] = []
        self.images: list[str] = []
        self.contents: list[tuple[str, ...]] = []
        self.system = len(data.system_message or "") / _CHARACTERS_A_TOKEN
        if data.system_message is None:
            named = f"{data.dataset_format} {data.dataset_name}".lower()
            self.system = sum(tokens for name, tokens in _SYSTEM_TOKENS.items() if name in named)
        template = _TEMPLATE_TOKENS + self.system
        for row in _some_rows(files, SAMPLED):
            self._add(row, template)
        self.rows = _sliced(self.rows, data.dataset_train_split)
        if data.max_train_samples is not None:
            self.rows = min(self.rows, data.max_train_samples)

    def _add(self, row: Mapping[str, Any], template: float) -> None:
        texts, answers, images = 0, 0, []
        for column, value in row.items():
            for kind, found in _contents(column, value):
                if kind == "image":
                    images.append(found)
                elif kind == "answer":
                    answers += len(found)
                else:
                    texts += len(found)
        patches = [self._patches(image) for image in images]
        tokens = template + (texts + answers) / _CHARACTERS_A_TOKEN + sum(count / 4 + 2 for count in patches)
        self.read.append((tokens, 1 + answers / _CHARACTERS_A_TOKEN, patches))
        names = tuple(_identity(image) for image in images)
        self.images += names
        self.contents.append(names)

    def _patches(self, image: Any) -> int:
        from PIL import Image

        content = image.get("bytes") if isinstance(image, Mapping) else None
        name = image.get("path") if isinstance(image, Mapping) else image
        source = io.BytesIO(content) if content else self.folder / str(name)
        with Image.open(source) as opened:
            width, height = opened.size
        return patches_of(width, height, self.vision.patch * self.vision.merge, *self.limits) * self.vision.merge**2

    def sizes(self) -> RowSizes:
        count = len(self.read)
        tokens = [entry[0] for entry in self.read]
        patches = [sum(entry[2]) for entry in self.read]
        images = sum(len(entry[2]) for entry in self.read)
        return RowSizes(
            rows=self.rows,
            tokens=sum(tokens) / count,
            tokens_squared=sum(value**2 for value in tokens) / count,
            target_tokens=sum(entry[1] for entry in self.read) / count,
            longest=math.ceil(max(tokens)),
            patches=sum(patches) / count,
            patches_squared=sum(size**2 for entry in self.read for size in entry[2]) / count,
            images=images / count,
            distinct_images=len(set(self.images)) / max(len(self.images), 1),
            computed=self._computed(tokens, patches),
            groups=(len({*self.contents} - {()}) + self.contents.count(())) / count,
            # Images come before other text in most data.
            opening=int(self.system) if all(self.contents) else 0,
            source=f"estimated from {count} of {self.rows:,} rows",
        )

    def _computed(self, tokens: Sequence[float], patches: Sequence[float]) -> float:
        """Return the share of tokens left when rows on the same images share them; runs of adjacent rows are read."""
        seen: set[tuple[str, ...]] = set()
        shared = 0.0
        for names, size in zip(self.contents, patches, strict=True):
            shared += size / 4 if names and names in seen else 0.0
            seen.add(names)
        return 1 - shared / max(sum(tokens), 1)


def patches_of(width: int, height: int, factor: int, least: int, most: int) -> int:
    """Return the merged tokens of an image: its sides rounded to multiples of `factor`, its pixels within the limits.

    The same as transformers' `smart_resize`, in whole tokens.
    """
    high, wide = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        high = max(factor, math.floor(height / scale / factor) * factor)
        wide = max(factor, math.floor(width / scale / factor) * factor)
    elif high * wide < least:
        scale = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return high // factor * (wide // factor)


def _contents(column: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the images, answers and other texts in a column's value, in whatever form the data has."""
    if isinstance(value, Mapping):
        if value.keys() & {"bytes", "path"} and not value.keys() - {"bytes", "path"}:
            yield "image", value
            return
        role = value.get("role") or value.get("from")
        for name, inner in value.items():
            answered = role in ("assistant", "gpt") and name in ("content", "value")
            yield from _contents("answer" if answered else name, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _contents(column, inner)
    elif isinstance(value, str) and _IMAGE_COLUMNS.fullmatch(column):
        yield "image", value
    elif isinstance(value, str) and not _NO_TEXT.fullmatch(column):
        yield "answer" if _ANSWER.fullmatch(column) else "text", value


def _identity(image: Any) -> str:
    content = image.get("bytes") if isinstance(image, Mapping) else None
    return hashlib.sha256(content).hexdigest() if content else str(image)


def _count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows)
    size, lines, read = file.stat().st_size, 0, 0
    with file.open("rb") as opened:
        # Of a large file the first part tells how long its lines are.
        for line in opened:
            lines, read = lines + bool(line.strip()), read + len(line)
            if read > 2**24:
                break
    return round(lines * size / read) if read else 0


def _some_rows(files: Sequence[Path], most: int) -> Iterator[Mapping[str, Any]]:
    """Yield at most `most` rows in runs of adjacent ones: questions on one image stand together in most data."""
    each = max(1, most // max(len(files), 1))
    for file in list(files)[:most]:
        if file.suffix == ".parquet":
            yield from _of_parquet(file, each)
        else:
            with file.open("rb") as opened:
                lines = (line for line in opened if line.strip())
                yield from (json.loads(line) for line, _ in zip(lines, range(each), strict=False))


def _of_parquet(file: Path, most: int) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    opened = parquet.ParquetFile(file)
    groups = opened.num_row_groups
    wanted = sorted({number * groups // min(groups, 4) for number in range(min(groups, 4))})
    for number in wanted:
        batch = next(opened.iter_batches(batch_size=max(1, most // len(wanted)), row_groups=[number]), None)
        if batch is not None:
            yield from batch.to_pylist()


def _sliced(rows: int, split: str) -> int:
    """Count the rows of a split with a slice, such as train[:10%]."""
    match = re.search(r"\[(-?\d+)?(%)?:(-?\d+)?(%)?\]$", split)
    if not match:
        return rows

    def place(value: str | None, percent: str | None, default: int) -> int:
        if value is None:
            return default
        number = round(int(value) * rows / 100) if percent else int(value)
        return min(max(number + rows if number < 0 else number, 0), rows)

    return max(1, place(match[3], match[4], rows) - place(match[1], match[2], 0))
