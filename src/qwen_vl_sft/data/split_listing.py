"""Which files make up each split: as README.md states, else by names of files and folders, both as in `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, LargeList, List
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns
from datasets.info import DatasetInfosDict
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolderConfig
from datasets.packaged_modules.json.json import JsonConfig
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from qwen_vl_sft.errors import shortened

CARD_FILES = ("README.md", ".huggingface.yaml")
# Of a configuration in README.md, what is read here.
_SEPARATORS = ("sep", "delimiter")
_READ = {"data_files", "data_dir", "default", "name", "version", "description", "features", *_SEPARATORS}
# What the readers of `datasets` can be told beside that, with its default.
_OPTIONS = {
    option.name: option.default for reader in (CsvConfig, JsonConfig, ImageFolderConfig) for option in fields(reader)
}
# Of these no value depends.
_HARMLESS = {"chunksize", "block_size", "use_threads", "memory_map", "verbose", "drop_labels", "engine"}


@dataclass(frozen=True)
class Stated:
    """What README.md states of a configuration's files.

    Attributes:
        data_files: patterns of the splits' files, in one of the forms that `datasets` takes; None for names alone.
        data_dir: folder that these are relative to.
        separator: what stands between the values of tables.
        classes: names of the numbers of classes, see `RowFiles.classes`.
        unread: what it states beside that.
    """

    data_files: Any = None
    data_dir: str | None = None
    separator: str | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def names_files(self) -> bool:
        """Return whether the files are not found by their names alone."""
        return self.data_files is not None or self.data_dir is not None


def read_card(folder: Path) -> dict[str, Any]:
    """Return what a folder's README.md and .huggingface.yaml state, {} without any. Raises `ValueError`."""
    card, extra = (folder / name for name in CARD_FILES)
    try:
        data = DatasetCard.load(card).data.to_dict() if card.is_file() else {}
        found = {**data, **(yaml.safe_load(extra.read_text(encoding="utf-8")) or {} if extra.is_file() else {})}
        MetadataConfigs.from_dataset_card_data(DatasetCardData(**found))
        DatasetInfosDict.from_dataset_card_data(DatasetCardData(**found))
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of README.md cannot be read: {shortened(str(error))}") from None
    return found


def read_stated(card: Mapping[str, Any], config: str | None) -> Stated:
    """Return what a card (see `read_card`) states of a configuration, the default one for None.

    Raises `ValueError` for a configuration that is not there, or cannot be read.
    """
    data = DatasetCardData(**card)
    name, stated = _chosen(MetadataConfigs.from_dataset_card_data(data), config)
    separators = [stated[key] for key in _SEPARATORS if stated.get(key)]
    features = stated.get("features") or _features(data, name)
    return Stated(
        data_files=stated.get("data_files"),
        data_dir=stated.get("data_dir") or None,
        separator=separators[-1] if separators else None,
        classes={column: found for column, feature in (features or {}).items() if (found := _classes(feature))},
        unread=tuple(sorted(key for key, value in stated.items() if _is_unread(key, value))),
    )


def list_splits(base: str, root: str, stated: Stated) -> dict[str, tuple[str, ...]]:
    """Return the files of each split, as paths below the folder `root` in the order of their rows.

    `base` is that folder as a pattern; both are `hf://datasets/NAME@COMMIT` for a dataset on the Hub. Raises `ValueError`
    for files that lie elsewhere, and `OSError` for those that are not there.
    """
    return {split: tuple(dict.fromkeys(files)) for split, files in _matched(base, root, stated).items()}


def lists_twice(base: str, root: str, stated: Stated) -> bool:
    """Return whether `datasets` reads a file twice, as two of its patterns fit the name: train/train2017/a.parquet."""
    return any(len(set(files)) < len(files) for files in _matched(base, root, stated).values())


def _matched(base: str, root: str, stated: Stated) -> dict[str, list[str]]:
    folder = f"{base}/{stated.data_dir.strip('/')}" if stated.data_dir else base
    try:
        patterns = get_data_patterns(folder) if stated.data_files is None else sanitize_patterns(stated.data_files)
        found = DataFilesDict.from_patterns(patterns, folder)
    except EmptyDatasetError:
        return {}
    return {str(split): _below(files, f"{root}/") for split, files in found.items() if files}


def _chosen(configs: MetadataConfigs, config: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a configuration and what it states; the default one for None."""
    if not configs:
        if config not in (None, "default"):
            raise ValueError(f"dataset_config: {config} is not there; README.md names no configurations")
        return "default", {}
    chosen = configs.get_default_config_name() if config is None else config
    if chosen is None:
        raise ValueError(f"dataset_config is not set, and README.md names several: {shortened(', '.join(configs))}")
    if chosen not in configs:
        raise ValueError(f"dataset_config: {chosen} is not there; README.md names {shortened(', '.join(configs))}")
    return chosen, configs[chosen]


def _features(data: DatasetCardData, config: str) -> Any:
    infos = DatasetInfosDict.from_dataset_card_data(data)
    only = next(iter(infos.values())) if len(infos) == 1 and config == "default" else None
    found = infos.get(config, only)
    return found.features if found else None


def _classes(feature: Any) -> Any:
    """Return the names of classes anywhere in a feature, None where it has none."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if isinstance(feature, List | LargeList):
        inner = _classes(feature.feature)
        return {"list": inner} if inner else None
    if isinstance(feature, Mapping):
        fields = {name: found for name, part in feature.items() if (found := _classes(part))}
        return {"fields": fields} if fields else None
    return None


def _is_unread(key: str, value: Any) -> bool:
    if key in _READ | _HARMLESS or key not in _OPTIONS or value == _OPTIONS[key]:
        return False
    return not (key == "encoding" and str(value).lower() in ("utf-8", "utf8", "utf-8-sig"))


def _below(files: Sequence[str], root: str) -> list[str]:
    outside = [file for file in files if not file.startswith(root)]
    if outside:
        raise ValueError(f"README.md names a file outside of the dataset: {shortened(outside[0])}")
    return [file[len(root) :] for file in files]
