"""A second medium is an addition: one that a test makes up goes from a row to the batch as images do."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fixtures.messages import BLUE, RED, conversation_row, write_messages
from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.media import MEDIA, reading_once
from qwen_vl_sft.data.preview import shown
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow


@dataclass(frozen=True)
class Film:
    """So many frames of 4 x 4 patches."""

    kind: ClassVar[str] = "video"
    frames: int

    @property
    def origin(self):
        return str(self.frames).encode()

    @property
    def content_hash(self):
        return str(self.frames)


@dataclass(frozen=True)
class EncodedFilm:
    kind: ClassVar[str] = "video"
    content_hash: str
    grid: torch.Tensor


class FilmMedium:
    kind = "video"
    placeholder = "<video>"
    token_type = 2

    def file(self, value, folder):
        return Film(int(value))

    def token(self, chat):
        return chat.video

    def count_patches(self, file, processor, decode=False):
        return file.frames * 16

    def count_tokens(self, patches, processor):
        return patches // 4

    def encode(self, file, processor):
        return EncodedFilm(file.content_hash, torch.tensor([file.frames, 4, 4]))

    def model_inputs(self, encoded):
        return {"video_grid_thw": torch.stack([film.grid for film in encoded])} if encoded else {}

    def describe(self, encoded, processor):
        return f"[film of {encoded.grid[0]} frames]"


ROW = {
    "messages": [
        {"role": "user", "content": "<image>Before <video> and after <image>?"},
        {"role": "assistant", "content": "yes"},
    ],
    "images": [RED, BLUE],
    "videos": ["3"],
}


@pytest.fixture
def films(monkeypatch):
    monkeypatch.setitem(MEDIA, "video", FilmMedium())


def test_a_second_medium_goes_from_the_row_to_the_batch(films, tmp_path, tiny_processor):
    rows, encoder = open_rows(str(write_messages(tmp_path, [ROW])), "train"), Encoder(tiny_processor)
    conversation = rows.conversation({"row": 0})
    assert [item.kind for item in conversation.media] == ["image", "video", "image"]
    row = rows.encode({"row": 0}, encoder)
    types = row.mm_token_type_ids
    assert torch.unique_consecutive(types).tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert [int((types == number).sum()) for number in (1, 2)] == [8, 12]
    (length,) = scan(rows, encoder).lengths.tokens
    assert length == len(row.input_ids)
    batch = pad([row], encoder.pad_token_id)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert batch["video_grid_thw"].tolist() == [[3, 4, 4]]
    assert "[film of 3 frames]" in shown(row, encoder)


def test_without_it_such_a_row_is_refused(tmp_path):
    rows = open_rows(str(write_messages(tmp_path, [ROW])), "train")
    with pytest.raises(BadRow, match="has something in column videos, and only images are read"):
        rows.conversation({"row": 0})


def test_placeholders_of_each_medium_are_counted(films, tmp_path):
    rows = open_rows(str(write_messages(tmp_path, [{**ROW, "videos": ["3", "4"]}])), "train")
    with pytest.raises(BadRow, match=r"has 1 video placeholder\(s\) in its messages but 2 video\(s\); write <video>"):
        rows.conversation({"row": 0})


def test_what_is_shown_again_is_read_once(tmp_path, tiny_processor):
    rows = open_rows(str(write_messages(tmp_path, [conversation_row("<image><image>?", images=(RED, RED))])), "train")
    files = rows.conversation({"row": 0}).media
    read = []
    remembered = reading_once(lambda file: read.append(file) or Encoder(tiny_processor).read_media(file))
    one, two = map(remembered, files)
    assert one is two
    assert len(read) == 1
    assert one.content_hash == files[0].content_hash


def test_images_of_a_row_keep_their_order_in_the_preview(tmp_path, tiny_processor):
    rows = open_rows(str(write_messages(tmp_path, [conversation_row()], (84, 56))), "train")
    encoder = Encoder(tiny_processor)
    assert json.dumps(shown(rows.encode({"row": 0}, encoder), encoder)).count("84 x 56 pixels, 6 tokens") == 1
