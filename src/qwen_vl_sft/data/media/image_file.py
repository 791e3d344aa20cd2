"""Images of rows: encoded bytes or files, opened and decoded with all checks."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from qwen_vl_sft.data import git_lfs
from qwen_vl_sft.data.media import archives
from qwen_vl_sft.data.media.decoding import decode_upright
from qwen_vl_sft.errors import BadRow, first_line, quoted, shortened

# Pillow warns of a decompression bomb above this many pixels; no chart or photo needs more.
MAX_PIXELS_OF_A_FILE = 89_478_485
# smart_resize of the Qwen-VL image processors refuses anything more elongated.
MAX_ASPECT_RATIO = 200
# Orientations of EXIF that swap width and height.
_SIDEWAYS = (5, 6, 7, 8)
# By which files are known as images before they are opened.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2",
)  # fmt: skip
WAY_OUT_OF_URLS = "download the images into the data folder and name the files"
_SCHEME = re.compile(r"(?!file:|data:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# How the text of an encoded PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF or JPEG 2000 begins in base64.
_BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAA")
# So many bytes tell what a file is.
_HEAD = 256
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
# Shorter text is the name of a file.
_SHORTEST_BASE64 = 64
# No file has a longer name.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class ImageFile:
    """An image that is not decoded yet: encoded bytes, or the path of a file."""

    kind: ClassVar[str] = "image"
    data: bytes | None
    path: str | None

    @property
    def origin(self) -> bytes:
        """Return where the image comes from: its encoded bytes, or the path of its file, which is not read."""
        return self.data if self.data is not None else str(self.path).encode()

    @cached_property
    def content_hash(self) -> str:
        """Return the sha256 of its encoded bytes. Raises `BadRow` for a file that cannot be read."""
        return hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """Return its encoded bytes. Raises `BadRow` for a file that cannot be read."""
        if self.data is not None:
            return self.data
        try:
            try:
                return Path(str(self.path)).read_bytes()
            except NotADirectoryError:
                with archives.open_member(Path(str(self.path))) as member:
                    return member.read()
        except FileNotFoundError:
            raise self._missing() from None
        except (OSError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise BadRow(f"image{self._named()} cannot be read ({_told(error)})") from None

    def open(self) -> Image.Image:
        """Open without decoding pixels: size and mode come from the header. Raises `BadRow`.

        The sides are those before the image is turned upright; it makes as many patches either way.
        """
        try:
            image = self._opened()
        except FileNotFoundError:
            raise self._missing() from None
        except Image.DecompressionBombError as error:
            raise BadRow(f"image{self._named()} is refused: {error}") from None
        except (MemoryError, BadRow):
            raise
        except Exception as error:  # the readers of damaged files raise what they like, RuntimeError and IndexError too
            raise BadRow(f"image{self._named()} cannot be read ({_told(error)})") from None
        width, height = image.size
        if width * height > MAX_PIXELS_OF_A_FILE:
            raise BadRow(f"image{self._named()} of {width}x{height} pixels is refused: above {MAX_PIXELS_OF_A_FILE:,}")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise BadRow(f"image{self._named()} of {width}x{height} pixels is refused: more elongated than 200 to 1")
        if image.mode in ("I", "F"):
            raise BadRow(
                f"image{self._named()} is refused: its pixels are numbers of 32 bits, and what is black and white among"
                " them is not known; save it with 8 or 16 bits"
            )
        return image

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the image is turned upright, from the header. Raises `BadRow`."""
        image = self.open()
        try:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        except MemoryError:
            raise
        except Exception:  # as for `_turn_upright`
            sideways = False
        return (image.height, image.width) if sideways else image.size

    def decode(self) -> Image.Image:
        """Decode to RGB, upright as EXIF says, transparency over white as in Qwen's own code. Raises `BadRow`."""
        image = self.open()
        try:
            image.load()
            _turn_upright(image)
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:
            raise BadRow(f"image{self._named()} cannot be decoded ({_told(error)})") from None

    def pixels(self) -> torch.Tensor:
        """Decode as `decode` does, to [height, width, 3] uint8. Raises `BadRow`."""
        header = self.open()
        found = decode_upright(header, self.read())
        if found is not None:
            return found
        return torch.from_numpy(np.array(self.decode()))

    def _opened(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self.data) if self.data is not None else str(self.path))
        except NotADirectoryError:  # its path leads into an archive
            return ImageFile(self.read(), self.path)._opened()
        except UnidentifiedImageError:
            head = self.read()[:_HEAD]
        if git_lfs.is_pointer(head):
            raise BadRow(f"image{self._named()} is a Git LFS pointer, not the image; {git_lfs.WAY_OUT}")
        if not _is_heic(head):
            raise BadRow(f"image{self._named()} cannot be read (it is in no format that Pillow knows)")
        if not _register_heic():
            raise BadRow(
                f"image{self._named()} is HEIC, which is read where pillow-heif is installed (pip install"
                " 'qwen_vl_sft[heic]'); install it, or save the images as JPEG"
            )
        return Image.open(io.BytesIO(self.data) if self.data is not None else str(self.path))

    def _missing(self) -> BadRow:
        return BadRow(
            f"image file {shortened(str(self.path))} does not exist (names are relative to the data folder, or to"
            " image_folder)"
        )

    def _named(self) -> str:
        return f" {shortened(self.path)}" if self.path else ""


def _told(error: Exception) -> str:
    """Return the message of an error in a line; of the system's own errors without the path, which is told already."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _is_heic(head: bytes) -> bool:
    """Tell by its first bytes whether a file is HEIF with HEVC inside, as phones write it."""
    brands = head[8 : int.from_bytes(head[:4], "big")]
    return head[4:8] == b"ftyp" and any(brands[at : at + 4] in _HEIC_BRANDS for at in range(0, len(brands), 4))


def _register_heic() -> bool:
    """Let Pillow read HEIC; return whether it can."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _turn_upright(image: Image.Image) -> None:
    """Turn a decoded image as its EXIF says, as transformers, datasets and vLLM do."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data raise what they like; the pixels are as good as without
        return


def _to_rgb(image: Image.Image) -> Image.Image:
    from qwen_vl_utils.vision_process import to_rgb

    if image.mode.startswith("I;16"):
        # Pillow would cut the 65,536 levels off at 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    # Of all that is transparent, Qwen's function knows RGBA alone.
    return to_rgb(image.convert("RGBA") if image.has_transparency_data else image)


def is_url(name: str) -> bool:
    """Tell whether a name is that of a file elsewhere."""
    return _SCHEME.match(name) is not None


def _inline(value: str) -> bytes | None:
    """Return the bytes of a data URI or of base64 text, None for a name. Raises `BadRow`."""
    if value[:5].lower() == "data:":
        about, _, text = value.partition(",")
        if not about.lower().endswith(";base64"):
            raise BadRow(f"has an image as a data URI without base64: {value[:40]!r}; encode it as base64")
    elif len(value) >= _SHORTEST_BASE64 and value.startswith(_BASE64_BEGINNINGS):
        text = value
    else:
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        if text is value:
            return None
        raise BadRow(f"has an image as a data URI that is no base64: {value[:40]!r}") from None


def image_file(value: Any, folder: Path | None) -> ImageFile:
    """Return an image column's value as a file that is not decoded yet.

    It is bytes, a path, a data URI or base64 text, or one of these as `bytes`, `path` or `url` of a mapping. Raises `BadRow`.

    A path written in the data is relative to `folder` and may not leave it, as it is written. Links may: whoever keeps the
    folder made them, as the Hub's cache does, and the text of the data can make none.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return ImageFile(value["bytes"], value.get("path"))
        if isinstance(value.get("bytes"), str) and (data := _inline(value["bytes"])) is not None:
            return ImageFile(data, value.get("path"))
        known = value.get("path") or value.get("url")
        if known is None and any(entry is not None for entry in value.values()):
            known = dict(value)
        value = known
    if isinstance(value, bytes):
        return ImageFile(value, None)
    if value is None or value == "":
        raise BadRow("has a missing image")
    if not isinstance(value, str):
        raise BadRow(
            f"has an image that is neither its bytes nor the name of a file, but {quoted(value)}; write a path, base64 text,"
            f" or an object with one of path, bytes, url"
        )
    if (data := _inline(value)) is not None:
        return ImageFile(data, None)
    if is_url(value):
        raise BadRow(f"names an image by its URL, {shortened(value)}, and URLs are not read; {WAY_OUT_OF_URLS}")
    value = value.removeprefix("file://")
    shown = shortened(value)
    if "." not in value and max(map(len, value.split("/"))) > _LONGEST_NAME:
        raise BadRow(f"has an image as text that is neither a path nor whole base64 of an image: {value[:40]!r}")
    if folder is None:
        raise BadRow(f"names the image file {shown}, but the dataset is not a local folder")
    try:
        # Before links are followed: "link/../x" is x, wherever the link leads.
        name = Path(os.path.normpath(value))
        path, homes = (folder / name).resolve(), (folder.absolute(), folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, links in a circle
        raise BadRow(f"names the image file {shown!r}, which is no path ({first_line(error)})") from None
    written_inside = ".." not in name.parts and any((home / name).is_relative_to(home) for home in homes)
    if not written_inside and not path.is_relative_to(homes[1]):
        raise BadRow(
            f"names the image file {shown}, which lies outside the data folder {folder}; put the images, or a link to"
            f" their folder, into it and name them relative to it"
        )
    if not os.path.exists(path) and written_inside:
        written = next(home / name for home in homes if (home / name).is_relative_to(home))
        path = _in_archive(written, folder.absolute(), shown) or path
    return ImageFile(None, str(path))


def _in_archive(path: Path, folder: Path, shown: str) -> Path | None:
    """Return where a path leads if it leads into an archive, or an archive of the data folder holds its file."""
    if archives.split_path(path):
        return path
    try:
        found = archives.find(path, folder)
    except (OSError, ValueError) as error:
        raise BadRow(f"names the image file {shown}, which may be in an archive: {first_line(error)}") from None
    if len(found) > 1:
        both = " and ".join(shortened(str(place.relative_to(folder))) for place in found)
        raise BadRow(f"names the image file {shown}, which is there twice, as {both}; name it so")
    if not found and (unread := archives.unread_near(path, folder)):
        raise BadRow(
            f"names the image file {shown}, which does not exist; {unread.name} is an archive that is not read: unpack it, or"
            f" pack it again as .zip or .tar"
        )
    return found[0] if found else None
