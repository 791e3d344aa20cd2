"""PNG and JPEG decoded to the same pixels as by Pillow, without its copies: they are most of a worker's work.

Pillow and torchvision bring the same decoders, libpng and libjpeg-turbo. Pillow keeps a fourth byte of each pixel, which it
drops in a copy, and hands pixels out in another.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
from functools import cache

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

# How an image of [height, width, colors] is turned upright, by the orientation that its EXIF tells: as Pillow's
# `ImageOps.exif_transpose` does. First whether rows and columns change places, then which of them are turned round.
_TURNS: dict[int, tuple[bool, list[int]]] = {
    2: (False, [1]),
    3: (False, [0, 1]),
    4: (False, [0]),
    5: (True, []),
    6: (True, [1]),
    7: (True, [0, 1]),
    8: (True, [0]),
}
_ORIENTATION = 0x0112
# Above so many bytes glibc asks the kernel for each block anew, and gives it back when it is freed.
_MAPPED_BY_DEFAULT = 32 * 2**20
# Blocks up to here, images of 44 megapixels, stay with the process instead.
_KEPT = 128 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Parts of a PNG that may turn it, anywhere in the file; and further frames.
_LEFT_TO_PILLOW = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp", b"acTL")


def decode_upright(header: Image.Image, data: bytes) -> torch.Tensor | None:
    """Decode a PNG or JPEG of three colors to [height, width, 3] uint8, turned upright as its EXIF says.

    `header` is the opened image of `data`. Returns None for what only Pillow can decode, or refuse with a reason.
    """
    if 3 * header.width * header.height > _MAPPED_BY_DEFAULT:
        _keep_freed_memory()
    pixels = None
    if header.format in ("JPEG", "MPO"):
        pixels = _jpeg(header, data)
    elif header.format == "PNG":
        pixels = _png(header, data)
    # Pillow names what is wrong with a file whose header says something else than the decoder found.
    return pixels if pixels is not None and sorted(pixels.shape[:2]) == sorted(header.size) else None


def _jpeg(header: Image.Image, data: bytes) -> torch.Tensor | None:
    if header.mode != "RGB" or not _decodes_jpeg_like_pillow():
        return None
    pixels = _decoded_jpeg(data)
    if pixels is None:
        return None
    try:
        orientation = header.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data raise what they like; the pixels are as good as without
        orientation = 1
    swapped, turned = _TURNS.get(orientation, (False, []))
    upright = pixels.transpose(0, 1) if swapped else pixels
    return (upright.flip(turned) if turned else upright).contiguous()


def _png(header: Image.Image, data: bytes) -> torch.Tensor | None:
    """Decode 8 bits of each color; with an alpha channel only where nothing shows through."""
    tiles = getattr(header, "tile", None)
    raw_mode = tiles[0].args if tiles else None
    if (
        raw_mode not in ("RGB", "RGBA")
        or "transparency" in header.info
        or any(part in data for part in _LEFT_TO_PILLOW)
    ):
        return None
    try:
        planes = decode_png(_as_tensor(data), mode=ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    if len(planes) == 4:
        if int(planes[3].min()) < 255:
            return None
        planes = planes[:3]
    return planes.permute(1, 2, 0).contiguous() if len(planes) == 3 else None


def _decoded_jpeg(data: bytes) -> torch.Tensor | None:
    try:
        return decode_jpeg(_as_tensor(data), mode=ImageReadMode.RGB).permute(1, 2, 0)
    except RuntimeError:
        return None


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@cache
def _keep_freed_memory() -> None:
    """Have this process keep freed blocks of the size of a photo, up to twice `_KEPT`, for the next photo.

    Pages that the kernel hands out anew are a third of the time that decoding 12 megapixels takes. A setting of glibc; other
    C libraries have none.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)


@cache
def _decodes_jpeg_like_pillow() -> bool:
    """Return whether torchvision was built with a decoder that rounds as Pillow's does, tried on an image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((117, 95)))
    for image, subsampling in ((noise, 0), (noise, 2), (smooth, 1), (smooth, 2)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=80, subsampling=subsampling)
        found = _decoded_jpeg(buffer.getvalue())
        if found is None or not np.array_equal(found.numpy(), np.asarray(Image.open(buffer))):
            return False
    return True
