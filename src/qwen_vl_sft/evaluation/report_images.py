"""The charts of `report.html`: inside the page where there are few, else in files beside it."""

from __future__ import annotations

import base64
import io
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vl_sft.cpu_cores import usable_cores
from qwen_vl_sft.data.media.image_file import ImageFile

IMAGES_FOLDER = "report_images"
# Wide enough to read a chart's labels; hundreds of them stay a file that can be mailed.
MAX_WIDTH, MAX_HEIGHT = 480, 1200
FORMATS: dict[str, dict[str, Any]] = {
    "webp": {"quality": 80},
    "jpeg": {"quality": 80, "optimize": True},
    "png": {"optimize": True},
}
# A file of at most so many bytes is copied as it is, in a format that browsers show: to make it smaller takes longer.
COPIED_BYTES = 64 * 1024
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif"}
# Charts that are read ahead of the threads that write them.
_AHEAD = 64
# What a page shows: an address, and the width and height in pixels to show it in.
Shown = tuple[str, int, int]


def embed(image: Image.Image, most: tuple[int, int] = (MAX_WIDTH, MAX_HEIGHT)) -> Shown:
    """Return an RGB image as the smallest data URI, with its width and height, which are `most`."""
    image = _reduced(image, most)
    candidates = {}
    for kind, options in FORMATS.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        candidates[kind] = buffer.getvalue()
    kind = min(candidates, key=lambda name: len(candidates[name]))
    return f"data:image/{kind};base64,{base64.b64encode(candidates[kind]).decode()}", *image.size


def embed_file(file: ImageFile) -> Shown:
    """Return an image file as `embed` does."""
    return embed(file.decode())


def write_beside(folder: Path, file: ImageFile) -> Shown:
    """Write an image file into `folder`, and return its address relative to the page above that. Raises `OSError`."""
    header = file.open()
    data = file.data if file.data is not None else Path(str(file.path)).read_bytes()
    extension = _EXTENSIONS.get(header.format or "")
    if extension is not None and len(data) <= COPIED_BYTES:
        width, height = _fitting(*header.size)
    else:
        image, buffer, extension = _reduced(file.decode()), io.BytesIO(), "webp"
        image.save(buffer, "webp", quality=80, method=1)
        data, (width, height) = buffer.getvalue(), image.size
    name = f"{file.content_hash[:24]}.{extension}"
    (folder / name).write_bytes(data)
    return f"{folder.name}/{name}", width, height


class ImageWriter:
    """Numbers the different images of a page, and writes each of them once, in threads; a context manager.

    Args:
        write: returns what a page shows of a file.
    """

    def __init__(self, write: Callable[[ImageFile], Shown]) -> None:
        self._write = write
        self._numbers: dict[str, int] = {}
        self._written: list[Future[Shown]] = []
        self._pending: deque[Future[Shown]] = deque()
        self._pool = ThreadPoolExecutor(max_workers=usable_cores())

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def number(self, file: ImageFile) -> int:
        """Return the number of an image, which is written if it is new. Waits when too many are ahead."""
        content_hash = file.content_hash
        if content_hash not in self._numbers:
            self._numbers[content_hash] = len(self._written)
            self._written.append(self._pool.submit(self._write, file))
            self._pending.append(self._written[-1])
            if len(self._pending) > _AHEAD:
                self._pending.popleft().result()
        return self._numbers[content_hash]

    def shown(self) -> list[Shown]:
        """Return what the page shows of each image, by its number."""
        return [written.result() for written in self._written]


def _fitting(width: int, height: int, most: tuple[int, int] = (MAX_WIDTH, MAX_HEIGHT)) -> tuple[int, int]:
    scale = min(1.0, most[0] / width, most[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _reduced(image: Image.Image, most: tuple[int, int] = (MAX_WIDTH, MAX_HEIGHT)) -> Image.Image:
    size = _fitting(*image.size, most)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
