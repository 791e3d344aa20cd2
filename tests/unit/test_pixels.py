"""Pixels that training decodes, resizes and normalises are those of Pillow and of the model's image processor."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.messages import png
from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media import decoding
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.data.media.patches import PatchNormalizer, cut_into_patches, join_patches
from qwen_vl_sft.errors import BadRow


def picture(width=117, height=75, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageFile(buffer.getvalue(), None)


def with_alpha(low):
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: max(value, low)))
    return image


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


FAST = {
    "png": saved(picture()),
    "nothing shows through": saved(with_alpha(255)),
    "jpeg": saved(picture(), "JPEG"),
    "jpeg of full colors": saved(picture(), "JPEG", subsampling=0, quality=95),
    "progressive": saved(picture(), "JPEG", progressive=True),
    "several pictures": saved(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    **{f"turned {number}": saved(picture(), "JPEG", exif=oriented(number)) for number in range(1, 10)},
}
SLOW = {
    "clear": saved(with_alpha(0)),
    "one clear color": saved(picture(), transparency=(0, 0, 0)),
    "palette": saved(picture().convert("P")),
    "palette, clear": saved(picture().convert("P"), transparency=0),
    "grey": saved(picture().convert("L")),
    "16 bits": saved(Image.fromarray(np.arange(60_000, 60_400, dtype=np.uint16).reshape(20, 20))),
    "turned png": saved(picture(), exif=oriented(6)),
    "grey jpeg": saved(picture().convert("L"), "JPEG"),
    "four inks": saved(picture().convert("CMYK"), "JPEG"),
    "webp": saved(picture(), "WEBP"),
    "gif": saved(picture(), "GIF"),
}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_pixels_are_those_of_pillow(name):
    file = (FAST | SLOW)[name]
    assert np.array_equal(file.pixels().numpy(), np.asarray(file.decode()))
    assert (decoding.decode_upright(file.open(), file.data) is not None) == (name in FAST)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_file_is_read_or_refused_as_pillow_does_it(kind):
    draw, whole = random.Random(0), saved(picture(), kind).data

    def read(decode):
        try:
            return np.asarray(decode()).tolist()
        except BadRow as error:
            return str(error)

    for number in range(60):
        data = bytearray(whole)
        if number % 2:
            data = data[: draw.randrange(20, len(data))]
        else:
            data[draw.randrange(2, len(data))] = draw.randrange(256)
        file = ImageFile(bytes(data), "a")
        assert read(file.pixels) == read(file.decode)


def test_without_a_decoder_that_rounds_like_pillows_its_own_is_used(monkeypatch):
    monkeypatch.setattr(decoding, "_decodes_jpeg_like_pillow", lambda: False)
    file = FAST["jpeg"]
    assert decoding.decode_upright(file.open(), file.data) is None
    assert np.array_equal(file.pixels().numpy(), np.asarray(file.decode()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_rescale": False}, {"do_normalize": False}, {"do_resize": False}, {"patch_size": 16, "merge_size": 1}],
)
@pytest.mark.parametrize("size", [(112, 56), (117, 75), (1201, 797), (31, 620)])
def test_patches_are_those_of_the_image_processor(size, settings, tiny_processor):
    if not settings.get("do_resize", True):
        size = (112, 56)
    image_processor = type(tiny_processor.image_processor)(
        size={"shortest_edge": 3136, "longest_edge": 200_704}, **settings
    )
    image = picture(*size)
    wanted = image_processor(images=[image], return_tensors="pt")
    patches, grid = cut_into_patches(torch.from_numpy(np.array(image)), image_processor)
    assert patches.dtype == torch.uint8
    assert torch.equal(grid, wanted["image_grid_thw"][0])
    found = PatchNormalizer.of(image_processor)(patches)
    if "do_normalize" in settings:  # it multiplies then, and does not divide
        torch.testing.assert_close(found, wanted["pixel_values"], rtol=1e-6, atol=0)
    else:
        assert torch.equal(found, wanted["pixel_values"])


def test_batches_in_bytes_become_the_same_pixels(tiny_processor):
    encoder = Encoder(tiny_processor)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    rows = [encoder.encode(Conversation([question, answer], [file])) for file in (FAST["png"], ImageFile(png(), None))]
    whole, small = (pad(rows, encoder.pad_token_id, in_bytes=in_bytes)["pixel_values"] for in_bytes in (False, True))
    assert small.dtype == torch.uint8
    assert small.nbytes * 8 == whole.nbytes
    assert torch.equal(encoder.normalize_patches(small), whole)
    assert torch.equal(encoder.normalize_patches(small, torch.bfloat16), whole.bfloat16())
    assert torch.equal(torch.cat([image.pixel_values for row in rows for image in row.media]), whole)


@pytest.mark.parametrize("size", [(117, 75), (28, 200), (56, 56)])
def test_patches_are_joined_to_the_image_that_was_cut(size, tiny_processor):
    processor = tiny_processor.image_processor
    pixels = saved(picture(*size)).pixels()
    patches, grid = cut_into_patches(pixels, processor)
    joined = join_patches(patches, grid, processor)
    assert joined.shape == (int(grid[1]) * 14, int(grid[2]) * 14, 3)
    # Cut again, without a resize that would change anything, they are the same.
    again, same_grid = cut_into_patches(joined, processor)
    assert torch.equal(again, patches)
    assert torch.equal(same_grid, grid)
    assert (joined.float().mean() - pixels.float().mean()).abs() < 5
    plain = np.asarray(Image.fromarray(pixels.numpy()).resize((joined.shape[1], joined.shape[0]), Image.BICUBIC))
    assert np.abs(plain.astype(int) - joined.numpy().astype(int)).mean() < 2
