import copy
import io
from pathlib import Path

import pytest
import torch
import trl
from PIL import Image

from fixtures.messages import png
from qwen_vl_sft.data import turn_texts
from qwen_vl_sft.data.chat_template import ChatTemplate
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import BadRow, OverLongRow, UserError
from qwen_vl_sft.families.base import ChatFormat

IMAGE = ImageFile(png("red", (56, 56)), None)  # 2x2 merged patches: four image tokens


def pixels(encoded):
    return torch.cat([image.pixel_values for image in encoded.media])


def text(role, words):
    return {"role": role, "content": [{"type": "text", "text": words}]}


def chart(question="Which color?", answer="red"):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return Conversation([user, text("assistant", answer)], [IMAGE])


# <|im_start|>system \n You are a helpful assistant. <|im_end|> \n
SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
# <|im_start|>user \n <|vision_start|> 4 x <|image_pad|> <|vision_end|> Which color? <|im_end|> \n
USER = [151644, 872, 198, 151652, 151655, 151655, 151655, 151655, 151653, 23085, 1894, 30, 151645, 198]
# <|im_start|>assistant \n
TURN = [151644, 77091, 198]
# red <|im_end|>
ANSWER = [1151, 151645]
NEWLINE = [198]


def test_literal_labels_with_the_real_tokenizer(real_processor):
    encoded = Encoder(real_processor).encode(chart())
    assert encoded.input_ids.tolist() == SYSTEM + USER + TURN + ANSWER + NEWLINE
    assert encoded.labels.tolist() == [-100] * 28 + ANSWER + [-100]
    assert encoded.mm_token_type_ids.tolist() == [0] * 15 + [1] * 4 + [0] * 12
    assert encoded.image_grid_thw.tolist() == [[1, 4, 4]]
    assert pixels(encoded).shape == (16, 3 * 2 * 14 * 14)


def test_train_on_all_is_the_tutorials_collator(real_processor):
    encoded = Encoder(real_processor, train_on="all").encode(chart())
    hidden = {151643, 151652, 151653, 151655}  # pad, vision start, vision end, image pad
    wanted = [-100 if token in hidden else token for token in SYSTEM + USER + TURN + ANSWER + NEWLINE]
    assert encoded.labels.tolist() == wanted


def test_every_assistant_turn_is_learned(real_processor):
    first = chart()
    conversation = Conversation([*first.messages, text("user", "Sure?"), text("assistant", "yes")], first.media)
    encoded = Encoder(real_processor).encode(conversation)
    learned = encoded.labels != -100
    assert encoded.labels[learned].tolist() == [*ANSWER, 9693, 151645]
    assert learned.nonzero().flatten().tolist() == [28, 29, 41, 42]


def test_the_system_message_stands_first_unless_the_row_brings_its_own(real_processor):
    encoder = Encoder(real_processor, system_message=CHARTQA_SYSTEM_MESSAGE)
    shown = real_processor.tokenizer.decode(encoder.encode(chart()).input_ids)
    assert shown.startswith(f"<|im_start|>system\n{CHARTQA_SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n")
    own = Conversation([text("system", "Be brief."), *chart().messages], [IMAGE])
    shown = real_processor.tokenizer.decode(encoder.encode(own).input_ids)
    assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("answer", ["red", "\nred", " red ", "4.5", "100%", "é", "赤", "a\n\nb"])
def test_a_prompt_in_training_is_the_prompt_of_generation(real_processor, answer):
    encoder = Encoder(real_processor, system_message=CHARTQA_SYSTEM_MESSAGE)
    encoded, prompt = encoder.encode(chart(answer=answer)), encoder.encode_prompt(chart(answer=answer))
    first = int((encoded.labels != -100).nonzero()[0])
    assert encoded.input_ids[:first].tolist() == prompt.input_ids.tolist()
    learned = encoded.labels[encoded.labels != -100]
    assert real_processor.tokenizer.decode(learned) == answer + "<|im_end|>"
    assert torch.equal(pixels(encoded), pixels(prompt))


def test_encoding_is_the_processors_own(real_processor, shared):
    from qwen_vl_sft.data.dataset import open_rows

    encoder = Encoder(real_processor, system_message=CHARTQA_SYSTEM_MESSAGE)
    rows = open_rows(str(shared / "chartqa"), "val[:4]")
    for index in range(4):
        conversation = rows.conversation({"row": index})
        encoded = encoder.encode(conversation)
        messages = [text("system", CHARTQA_SYSTEM_MESSAGE), *conversation.messages]
        whole = real_processor(
            text=[real_processor.apply_chat_template(messages, tokenize=False)],
            images=[image.decode() for image in conversation.media],
            return_tensors="pt",
        )
        assert torch.equal(encoded.input_ids, whole["input_ids"][0])
        assert torch.equal(encoded.mm_token_type_ids, whole["mm_token_type_ids"][0])
        assert torch.equal(pixels(encoded), whole["pixel_values"])
        measured = encoder.measure(conversation)
        assert measured.tokens == len(encoded.input_ids)
        assert measured.target_tokens == int((encoded.labels != -100).sum())
        assert measured.patches == len(pixels(encoded))


def turns(count, system=(), tail=(), extra=()):
    """A conversation of so many turns, the third with two answers in a row."""
    messages = list(system)
    for number in range(count):
        shown = [{"type": "image"}] if number % 3 == 0 else []
        asked = [*shown, {"type": "text", "text": f" Question {number}?\n"}]
        messages += [{"role": "user", "content": asked}, text("assistant", f"It is {number}. " * (number % 4))]
        messages += extra if number == 2 else []
    return [*messages, *tail]


CONVERSATIONS = [
    turns(12),
    turns(12, system=[text("system", "Be brief.")]),
    turns(9, tail=[text("user", "And then?")]),
    turns(7, extra=[text("assistant", "Once more.")]),
    turns(7, extra=[text("user", "A question"), text("user", "in two")], tail=[text("assistant", "Well.")]),
]


@pytest.mark.parametrize("options", [{}, {"add_vision_id": True}])
@pytest.mark.parametrize("template", [None, "qwen2_5_vl.jinja", "qwen3_vl.jinja", "qwen3_5_nothink.jinja"])
def test_long_conversations_are_cut_as_if_each_answer_were_rendered(template, options, tiny_processor):
    processor = copy.copy(tiny_processor)
    if template:
        processor.chat_template = (Path(trl.__file__).parent / "chat_templates" / template).read_text()
    chat_template = ChatTemplate(processor, ChatFormat(template_options=options))
    for messages in CONVERSATIONS:
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            wanted = list(turn_texts._rendered_in_full(chat_template, messages, answers, ()))
        except UserError:
            wanted = UserError
        if wanted is UserError:
            with pytest.raises(UserError):
                list(turn_texts.turn_texts(chat_template, messages))
        else:
            assert list(turn_texts.turn_texts(chat_template, messages)) == wanted
            assert "".join(prompt + answer for prompt, answer in wanted).count("Question") == str(messages).count(
                "Question"
            )


def test_the_text_of_a_long_conversation_is_rendered_a_fixed_number_of_times(tiny_processor):
    rendered = []

    class Counting(ChatTemplate):
        def render_each(self, conversations, *options, **tools):
            texts = super().render_each(conversations, *options, **tools)
            rendered.append(sum(map(len, texts)))
            return texts

    costs = []
    for count in (10, 20, 40):
        rendered.clear()
        list(turn_texts.turn_texts(Counting(tiny_processor, ChatFormat()), turns(count)))
        costs.append(sum(rendered))
    assert costs[2] - costs[1] < 2.2 * (costs[1] - costs[0])


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("where", ["question", "answer"])
def test_structural_tokens_inside_a_text_are_refused(tiny_processor, token, where):
    with pytest.raises(BadRow, match="has the special token"):
        Encoder(tiny_processor).encode(chart(**{where: f"a {token} b"}))


def test_an_overlong_row_is_refused_not_cut(real_processor):
    whole = len(SYSTEM + USER + TURN + ANSWER + NEWLINE)
    assert len(Encoder(real_processor, max_length=whole).encode(chart()).input_ids) == whole
    encoder = Encoder(real_processor, max_length=whole - 1)
    tokens = encoder.measure(chart()).tokens
    for refuse in (lambda: encoder.encode(chart()), lambda: encoder.check_length(tokens)):
        with pytest.raises(OverLongRow, match="has 31 tokens, more than max_length 30"):
            refuse()


def test_pixel_limits_hold_and_are_saved(shared, tmp_path):
    from transformers import AutoProcessor

    from qwen_vl_sft.config.settings import ModelSettings
    from qwen_vl_sft.modeling.base_model import load_processor
    from qwen_vl_sft.tiny import MODEL_DIR

    processor = load_processor(ModelSettings(model_name_or_path=str(MODEL_DIR)), min_pixels=784, max_pixels=4 * 784)
    big = Conversation(chart().messages, [ImageFile(png("red", (560, 560)), None)])
    assert Encoder(processor).encode(big).image_grid_thw.tolist() == [[1, 4, 4]]
    processor.save_pretrained(tmp_path)
    assert Encoder(AutoProcessor.from_pretrained(tmp_path)).encode(big).image_grid_thw.tolist() == [[1, 4, 4]]


def test_a_photo_costs_the_same_upright_or_not(tiny_processor):
    """Lengths are read from headers, whose sides are those before an image is turned."""
    count = tiny_processor.image_processor.get_number_of_image_patches
    sides = [14, 27, 28, 43, 56, 113, 700, 1023, 2800]
    assert all(count(one, other, {}) == count(other, one, {}) for one in sides for other in sides)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (196, 57)).save(buffer, "JPEG", exif=exif)
    photo = Conversation(chart().messages, [ImageFile(buffer.getvalue(), None)])
    encoder = Encoder(tiny_processor)
    assert encoder.measure(photo) == encoder.measure(photo, lambda file: encoder.look_at(file, decode=True))
    assert encoder.encode(photo).image_grid_thw.tolist() == [[1, 14, 4]]
    assert encoder.measure(photo).tokens == len(encoder.encode(photo).input_ids)


def test_a_thinking_model_learns_thoughts_and_no_others(tiny_processor):
    template = Path(trl.__file__).parent / "chat_templates/qwen3_5_think.jinja"
    processor = copy.copy(tiny_processor)
    processor.chat_template = template.read_text()
    encoder = Encoder(processor)
    encoded = encoder.encode(chart(answer="<think>It is.</think>red"))
    learned = encoded.labels[encoded.labels != -100]
    assert processor.tokenizer.decode(learned) == "It is.\n</think>\n\nred<|im_end|>"
    with pytest.raises(
        BadRow, match=r"an answer without a thought.*'\\n</think>\\n\\nred' would be learned.*Instruct model"
    ):
        encoder.measure(chart())
    first = chart(answer="<think>It is.</think>red")
    later = [text("user", "Sure?"), text("assistant", "<think>I am.</think>yes")]
    with pytest.raises(UserError, match="leave out the thoughts of earlier turns"):
        encoder.measure(Conversation([*first.messages, *later], first.media))


def test_a_text_only_row(tiny_processor):
    encoded = Encoder(tiny_processor).encode(Conversation([text("user", "hi"), text("assistant", "yes")], []))
    assert encoded.media == ()
    assert encoded.image_grid_thw.shape == (0, 3)
    assert int((encoded.labels != -100).sum()) >= 2


def test_the_family_says_what_the_template_takes_and_which_tokens_are_structural(tiny_processor):
    chat = ChatFormat(template_options={"add_vision_id": True}, structural=("<|box_start|>",))
    encoder = Encoder(tiny_processor, chat=chat)
    for encoded in (encoder.encode(chart()), encoder.encode_prompt(chart())):
        assert "Picture 1: <|vision_start|>" in tiny_processor.tokenizer.decode(encoded.input_ids)
    with pytest.raises(BadRow, match=r"has the special token <\|box_start\|> inside the text of its user message"):
        encoder.encode(chart("Where is <|box_start|>?"))
