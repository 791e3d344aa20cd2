"""The first row as the model sees it: every token, the sizes of images, and what is learned."""

import re

import pytest

from fixtures.messages import BLUE, RED, conversation_row, write_messages
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.data.preview import preview, shown
from qwen_vl_sft.data.scan import scan

SEVERAL = conversation_row(
    "Between <image> and <image>:\nwhich is first?", "red, " * 40 + "then blue", images=(RED, BLUE)
)
SEVERAL["messages"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def prepared(tiny_processor, tmp_path):
    def prepare(row, **options):
        encoder = Encoder(tiny_processor, **options)
        return scan(open_rows(str(write_messages(tmp_path, [row], (84, 56))), "train"), encoder), encoder

    return prepare


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_every_token_is_shown_and_what_is_learned_is_marked(train_on, prepared, tiny_processor):
    train, encoder = prepared(SEVERAL, system_message="Be brief.", train_on=train_on)
    row, tokenizer = train.rows.encode({"row": 0}, encoder), tiny_processor.tokenizer
    text = shown(row, encoder)
    image = "[image of 84 x 56 pixels, 6 tokens]"
    assert text.count(image) == 2
    plain = text.replace("{{", "").replace("}}", "").replace(image, tiny_processor.image_token * 6)
    assert plain == tokenizer.decode(row.input_ids)
    marked = "".join(re.findall(r"{{(.*?)}}", text, re.DOTALL))
    assert marked == tokenizer.decode(row.labels[row.labels != IGNORE_INDEX])
    if train_on == "assistant":
        assert text.endswith("<|im_start|>assistant\n{{yes<|im_end|>}}\n")
        assert text.count("{{") == 2


def test_the_preview_is_80_columns_wide_and_counts(prepared):
    train, encoder = prepared(SEVERAL)
    lines = preview(train, encoder).splitlines()
    assert max(map(len, lines)) <= 80
    about = " ".join(line.strip() for line in lines[:3])
    assert about.startswith("first row   ")
    lengths = train.lengths
    assert (
        f", row 0: {lengths.tokens[0]:,} tokens, {lengths.target_tokens[0]:,} of them learned, between {{{{ and }}}}"
        in about
    )
    assert "    {{yes<|im_end|>}}" in lines


def test_the_first_row_of_a_stream_is_shown_too(prepared, tmp_path):
    train, encoder = prepared(SEVERAL)
    assert preview(open_rows(str(tmp_path), "train", streaming=True), encoder) == preview(train, encoder)
