"""Computing the image features that are not on disk yet, before training: each process its share."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qwen_vl_sft.batching.packed_collator import PackedCollator
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media import model_inputs
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.base_model import is_vision_frozen
from qwen_vl_sft.training.image_features import ImageFeatures, ImageLocation, in_words

logger = logging.getLogger(__name__)

# Merged tokens of a call of the tower: enough to fill a GPU.
_TOKENS_PER_CALL = 4096
_THREADS = 4
# How long a folder on a network may take to show a file that another machine has written.
_SECONDS_TO_APPEAR = 10


def fill(trainer: Any, features: ImageFeatures, skip_bad_rows: bool) -> None:
    """Compute the features that are missing; the packed batches of training have features instead of pixels.

    Files that are damaged are computed again. All processes must call at once, before the strategy wraps the model:
    each then holds the whole tower, or can gather it, and works through its share alone.

    Raises `UserError` on all processes when the disk has not enough room, or when they do not see each other's files.
    """
    collator, accelerator = trainer.data_collator, trainer.accelerator
    assert isinstance(collator, PackedCollator)
    assert is_vision_frozen(trainer.model)
    if accelerator.is_main_process:
        features.cache.begin(features.identity)
    missing = _missing(features, trainer)
    _check_room(features, missing, accelerator)
    left_out = []
    if missing:
        share = _share(features, missing, trainer)
        images = _Images(collator.rows.rows, collator.rows.encoder, features.locations, skip_bad_rows)
        left_out = _compute(trainer, features, images, share) if _shares(trainer) else []
    _check_all_seen(features, set(_gathered(left_out, accelerator)), accelerator)


def _missing(features: ImageFeatures, trainer: Any) -> list[str]:
    """Return the images without a sound file, the same list on every process; each looks at its part."""
    accelerator = trainer.accelerator
    mine = list(features.locations)[accelerator.process_index :: accelerator.num_processes]
    with ThreadPoolExecutor(_THREADS) as threads, _progress(trainer, len(mine), "checking image features") as bar:
        sound = []
        for whole in threads.map(features.cache.is_sound, mine):
            sound.append(whole)
            bar.update()
    found = _gathered([content_hash for content_hash, whole in zip(mine, sound, strict=True) if not whole], accelerator)
    damaged = sum(features.cache.holds(content_hash) for content_hash in found)
    if damaged and accelerator.is_main_process:
        print(f"features    {damaged:,} damaged files are computed again", flush=True)
    return found


def _check_room(features: ImageFeatures, missing: list[str], accelerator: Any) -> None:
    """Say what will be written, and refuse when it does not fit."""
    folder, needed = features.cache.folder, features.size(missing)
    free = shutil.disk_usage(_existing(folder)).free
    counts = f"{len(missing):,} of {len(features.locations):,} images to compute"
    text = f"{counts}, {in_words(needed)}; {in_words(free)} are free"
    if accelerator.is_main_process:
        print(f"features    {text}: {folder}", flush=True)
    # All must decide the same: the first may begin to write before the last has looked.
    if any(_gathered([needed > free], accelerator)):
        raise UserError(
            f"image_features_dir: {folder} has not enough room: {text}; name a folder on another disk, set"
            f" cache_image_features: int8, lower max_pixels, or leave cache_image_features out"
        )


def _share(features: ImageFeatures, missing: list[str], trainer: Any) -> list[list[str]]:
    """Return the images of this process in calls of the tower, of equal size over the processes."""
    accelerator = trainer.accelerator
    workers = [rank for rank, able in enumerate(_gathered([_shares(trainer)], accelerator)) if able]
    if accelerator.process_index not in workers:
        return []
    ordered = sorted(missing, key=lambda name: (-features.locations[name].tokens, name))
    calls: list[list[str]] = []
    room = 0
    for content_hash in ordered[workers.index(accelerator.process_index) :: len(workers)]:
        tokens = features.locations[content_hash].tokens
        if tokens > room:
            calls.append([])
            room = _TOKENS_PER_CALL
        calls[-1].append(content_hash)
        room -= tokens
    return calls


def _shares(trainer: Any) -> bool:
    """Return whether this process has the tower's weights; with FSDP's RAM-efficient loading the first of a machine alone."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return not getattr(plugin, "cpu_ram_efficient_loading", False) or trainer.accelerator.is_local_main_process


def _compute(trainer: Any, features: ImageFeatures, images: _Images, calls: list[list[str]]) -> list[str]:
    """Compute and write the features of these images; returns those that could not be read."""
    args, cache = trainer.args, features.cache
    loader = DataLoader(
        images,
        batch_sampler=calls,  # type: ignore[arg-type]
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
        # A separate generator, so that training's random numbers do not change.
        generator=torch.Generator(),
    )
    name, visual = family_of(trainer.model.config).tower_of(trainer.model)
    backbone = trainer.model.get_submodule(name.rpartition(".")[0])
    bar = _progress(trainer, sum(map(len, calls)), "computing image features")
    done: set[str] = set()
    writing: list[Future[None]] = []
    with bar, ThreadPoolExecutor(_THREADS) as threads, _whole(visual, args.device), trainer.accelerator.autocast():
        for batch in loader:
            read = [image for image in batch if image is not None]
            made = run_tower(backbone, read, args.device) if read else []
            _wait(writing, cache)
            writing = [
                threads.submit(cache.write, image.content_hash, values, image.grid)
                for image, values in zip(read, made, strict=True)
            ]
            done |= {image.content_hash for image in read}
            bar.update(len(batch))
        _wait(writing, cache)
    return [content_hash for call in calls for content_hash in call if content_hash not in done]


@torch.no_grad()
def run_tower(backbone: Any, images: Sequence[EncodedImage], device: torch.device) -> list[torch.Tensor]:
    """Compute the tower's output for each image and move it to the CPU; deeper layers are concatenated to the last."""
    inputs = {name: tensor.to(device) for name, tensor in model_inputs(images, in_bytes=True).items()}
    normalize = images[0].normalizer
    assert normalize is not None, "images that are decoded"
    pixels = normalize(inputs["pixel_values"])
    found = backbone.get_image_features(pixels, inputs["image_grid_thw"], return_dict=True)
    layers = family_of(backbone.config).feature_layers(found)
    return [torch.cat(parts, dim=-1).cpu() for parts in zip(*layers, strict=True)]


@contextmanager
def _whole(visual: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold the whole tower on the device: FSDP has not moved the model yet, and ZeRO-3 has split it."""
    home, training = next(visual.parameters()).device, visual.training
    split = [parameter for parameter in visual.parameters() if hasattr(parameter, "ds_id")]
    gathered = nullcontext()
    if split:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(split)
    # Under ZeRO-3 the weights are there already, but not yet the buffers.
    visual.to(device)
    visual.eval()
    try:
        with gathered:
            yield
    finally:
        visual.train(training)
        if home != device:
            visual.to(home)


def _wait(writing: Sequence[Future[None]], cache: FeatureCache) -> None:
    try:
        for future in writing:
            future.result()
    except OSError as error:
        raise UserError(
            f"image_features_dir: features could not be written to {cache.folder}: {error.strerror or error}; what is"
            f" there stays good, and the same command continues from it"
        ) from error


def _check_all_seen(features: ImageFeatures, left_out: set[str], accelerator: Any) -> None:
    """Raise `UserError` unless every process sees every file: training would stop at the first that it misses."""
    wanted = [content_hash for content_hash in features.locations if content_hash not in left_out]
    for _ in range(_SECONDS_TO_APPEAR):
        wanted = [content_hash for content_hash in wanted if not features.cache.holds(content_hash)]
        if not wanted:
            break
        time.sleep(1)
    unseen = _gathered([len(wanted)], accelerator)
    if any(unseen):
        worst = max(range(len(unseen)), key=unseen.__getitem__)
        raise UserError(
            f"image_features_dir: process {worst} does not see {unseen[worst]:,} of {len(features.locations):,} files in"
            f" {features.cache.folder}; name a folder that all machines share"
        )


def _progress(trainer: Any, total: int, what: str) -> Any:
    quiet = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    return tqdm(total=total, desc=what, unit=" images", disable=quiet, leave=False)


def _gathered(values: list[Any], accelerator: Any) -> list[Any]:
    """Return the values of all processes in one list, in the order of the processes."""
    return gather_object(values) if accelerator.num_processes > 1 else values


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


class _Images(Dataset[Any]):
    """Images by hash, decoded in the loader's workers; None for one that cannot be read, where bad rows are skipped."""

    def __init__(self, rows: Rows, encoder: Encoder, locations: dict[str, ImageLocation], skip_bad_rows: bool) -> None:
        self.rows = rows
        self.encoder = encoder
        self.locations = locations
        self.skip_bad_rows = skip_bad_rows

    def __getitem__(self, content_hash: str) -> EncodedImage | None:
        location = self.locations[content_hash]
        try:
            with self.rows.opened({"row": location.row}) as (conversation, _):
                image = self.encoder.read_media(conversation.media[location.number])
                if image.content_hash != content_hash:
                    raise BadRow("shows an image that has changed since the rows were checked")
                return image
        except BadRow as error:
            if not self.skip_bad_rows:
                raise
            logger.warning("skipped: %s", error)
            return None
