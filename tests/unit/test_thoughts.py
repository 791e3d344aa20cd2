"""Thoughts before answers: prompts of training and generation agree, for all chat templates of Qwen3.5, 3.6 and 3.8."""

import copy

import pytest

from fixtures.messages import conversation_row, write_messages
from fixtures.models import chat_template
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.data.conversation import Conversation, without_thought
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats.base import last_answer
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.scoring import Question, score_row
from qwen_vl_sft.families import qwen2_vl, qwen3_5
from qwen_vl_sft.inference.generation import decode_answer
from qwen_vl_sft.modeling.model_rules import problems_of_family
from qwen_vl_sft.training.plan_warnings import warnings

TEMPLATES = ["qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"]
EMPTY, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nIt looks red.\n</think>\n\n"


@pytest.fixture(params=TEMPLATES)
def processor(request, tiny_processor):
    found = copy.copy(tiny_processor)
    found.chat_template = qwen3_5.FAMILY.adapt_template(chat_template(request.param))
    return found


def encoder_of(processor, enable_thinking):
    return Encoder(processor, chat=qwen3_5.FAMILY.chat_with(enable_thinking))


def turns(*texts):
    """A conversation of questions and answers in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]


def told(encoder, messages):
    """The text of a row, with targets in braces."""
    row = encoder.encode(Conversation(messages, []))
    parts = [
        f"{{{encoder.processor.tokenizer.decode([token])}}}"
        if label >= 0
        else encoder.processor.tokenizer.decode([token])
        for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
    ]
    return "".join(parts).replace("}{", "")


@pytest.mark.parametrize("answers", [["red"], ["red", "blue"], [f"{EMPTY}red", "blue", "red"]])
def test_answers_without_thoughts_follow_an_empty_one(processor, answers):
    """Also earlier ones: Qwen3.5's own template drops their empty thoughts once a turn follows."""
    messages = turns(*(text for answer in answers for text in ("Which color?", answer)))
    text = told(encoder_of(processor, False), messages)
    for answer in answers:
        assert f"<|im_start|>assistant\n{EMPTY}{{{answer.removeprefix(EMPTY)}<|im_end|>}}" in text
    assert text.count("<think>") == len(answers)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_thoughts_are_learned_with_their_answers(processor, count):
    messages = turns(*["Which color?", f"{THOUGHT}red"] * count)
    text = told(encoder_of(processor, True), messages)
    assert text.count("<think>\n{It looks red.\n</think>\n\nred<|im_end|>}") == count
    beside = [
        {**message, "reasoning_content": "It looks red.", "content": [{"type": "text", "text": "red"}]}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
    assert told(encoder_of(processor, True), beside) == text


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_prompt_is_generated_from_as_it_was_trained(processor, thinking, count):
    encoder = encoder_of(processor, thinking)
    messages = turns(*["Which color?", f"{THOUGHT}red" if thinking else "red"] * count)
    row = encoder.encode(Conversation(messages, []))
    prompt = encoder.encode_prompt(Conversation(messages, [])).input_ids
    assert row.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert row.labels[: len(prompt)].max() == -100 or count > 1
    assert row.labels[len(prompt)] == row.input_ids[len(prompt)]


@pytest.mark.parametrize(
    ("thinking", "answer", "message"),
    [
        (
            False,
            f"{THOUGHT}red",
            "has an answer with a thought, and enable_thinking is false.*set enable_thinking: true",
        ),
        (False, "It looks red.</think>red", "has an answer with a thought"),
        (True, "red", "has an answer without a thought, and enable_thinking is true.*set enable_thinking: false"),
        (True, f"{EMPTY}red", "has an answer without a thought"),
        (True, f"Well, {THOUGHT}red", "another place than after one thought at its beginning"),
        (True, f"{THOUGHT}red{THOUGHT}", "another place than after one thought at its beginning"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(processor, thinking, answer, message):
    for messages in (turns("Which color?", answer), turns("Which color?", answer, "And now?", answer)):
        with pytest.raises(BadRow, match=message):
            encoder_of(processor, thinking).encode(Conversation(messages, []))


def test_the_template_of_qwen3_5_gets_the_option_that_qwen3_6s_has():
    adapt = qwen3_5.FAMILY.adapt_template
    assert adapt(chat_template("qwen3_5_think")) == chat_template("qwen3_6").replace(
        "args_value | string if args_value is string else args_value | tojson | safe",
        "args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string)"
        " else args_value | string",
    )
    for name in ("qwen3_6", "qwen3_8"):
        assert adapt(chat_template(name)) == chat_template(name)


def test_a_family_without_the_switch_refuses_it():
    keys = {"model_name_or_path": "some/model", "dataset_name": "data", "enable_thinking": True}
    recipe = read_recipe(None, keys)
    (problem,) = problems_of_family(recipe, qwen2_vl.FAMILY)
    assert problem.startswith("enable_thinking does not work with Qwen2-VL: its chat template decides by itself")
    assert not list(problems_of_family(recipe, qwen3_5.FAMILY))
    assert qwen2_vl.FAMILY.chat_with(False) is qwen2_vl.FAMILY.chat
    with pytest.raises(UserError, match=r"enable_thinking does not work with Qwen2-VL: .*; leave it out"):
        qwen2_vl.FAMILY.chat_with(True)


@pytest.mark.parametrize(("keys", "count"), [({}, 1), ({"max_new_tokens": 2048}, 0)])
def test_thoughts_that_would_be_cut_are_told(keys, count):
    recipe = read_recipe(None, {"model_name_or_path": "m", "dataset_name": "d", "enable_thinking": True, **keys})
    assert len([text for text in warnings(recipe, []) if "max_new_tokens" in text]) == count


@pytest.mark.parametrize("processor", TEMPLATES[:1], indirect=True)
def test_a_scan_of_other_prompts_is_not_taken(processor, tmp_path):
    rows = open_rows(str(write_messages(tmp_path, [conversation_row()])), "train")
    assert len(scan(rows, encoder_of(processor, False)).kept) == 1
    with pytest.raises(UserError, match="has an answer without a thought"):
        scan(rows, encoder_of(processor, True))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"{THOUGHT}red", "red"),
        ("It looks red.\n</think>\n\nred", "red"),
        ("<think>\nIt looks", ""),
        ("red", "red"),
        (" a < b ", " a < b "),
    ],
)
def test_a_thought_is_not_scored(text, answer):
    assert without_thought(text) == answer
    assert last_answer({}, Conversation(turns("Which color?", text), [])) == [answer]
    row = score_row(Question(0, "Which color?", ["red"], None), {"tuned": text})
    assert row["arms"]["tuned"]["answer"] == text
    assert row["arms"]["tuned"]["exact_match"] == (answer == "red")


@pytest.mark.parametrize("processor", TEMPLATES[:1], indirect=True)
def test_a_generated_thought_has_the_opening_that_the_prompt_ends_with(processor):
    ids = processor.tokenizer("It looks")["input_ids"]
    assert decode_answer(encoder_of(processor, True), ids) == "<think>\nIt looks"
    assert decode_answer(encoder_of(processor, False), ids) == "It looks"


def test_a_wrong_value_is_told():
    with pytest.raises(UserError, match="enable_thinking"):
        read_recipe(None, {"enable_thinking": "sometimes"})
