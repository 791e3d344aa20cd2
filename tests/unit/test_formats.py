"""Formats of rows are additions: each is one module, and one that a test makes up is read as those that ship."""

import ast
import json
from dataclasses import fields
from itertools import pairwise

import pytest

from fixtures.messages import RED, png
from fixtures.repository import REPOSITORY
from qwen_vl_sft.config.settings import DATASET_FORMATS, DataSettings
from qwen_vl_sft.data.conversation import Conversation, prompt_of
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats import FORMATS, choose_format, known_format
from qwen_vl_sft.data.formats.base import DataFormat
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.data.scan import scan
from qwen_vl_sft.errors import MOST_QUOTED, BadRow, UserError
from qwen_vl_sft.evaluation.task import read_question


def parse_riddle(row, folder):
    question = [{"type": "image"}, {"type": "text", "text": row["riddle"]}]
    answer = [{"type": "text", "text": row["solution"][0]}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(messages, [MEDIA["image"].file(row["picture"], folder)])


RIDDLES = DataFormat(
    name="riddles",
    help="picture, riddle, solution",
    columns=frozenset({"picture", "riddle", "solution"}),
    parse=parse_riddle,
    priority=5,
    refused={"hint": "has a hint, which is not read"},
    accepted_answers=lambda row, conversation: row["solution"],
    system_message="Solve it.",
)


@pytest.fixture
def riddles(monkeypatch, tmp_path):
    """Register the format, and return a function that writes rows of it."""
    monkeypatch.setitem(FORMATS, RIDDLES.name, RIDDLES)
    (tmp_path / "images").mkdir()
    (tmp_path / RED).write_bytes(png("red"))

    def write(**changes):
        row = {"picture": RED, "riddle": "Which color?", "solution": ["red", "crimson"], **changes}
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        return str(tmp_path)

    return write


def test_a_format_of_ones_own_is_recognised_encoded_and_asked_about(riddles, tiny_processor):
    rows = open_rows(riddles(), "train")
    assert rows.format is RIDDLES
    encoder = Encoder(tiny_processor, rows.format.resolve_system_message(None))
    found = scan(rows, encoder)
    row = found.rows.encode({"row": 0}, encoder)
    assert tiny_processor.tokenizer.decode(row.labels[row.labels != -100]) == "red<|im_end|>"
    assert "Solve it." in tiny_processor.tokenizer.decode(row.input_ids)
    assert found.lengths.tokens.tolist() == [len(row.input_ids)]
    assert len(row.media) == 1
    raw = rows.dataset[0]
    question = read_question(raw, rows.conversation(raw).up_to_last_answer(), rows.format)
    assert (question.question, question.answers) == ("Which color?", ["red", "crimson"])


def test_what_a_format_refuses_is_told_by_name(riddles):
    rows = open_rows(riddles(hint="warm"), "train", row_format="riddles")
    with pytest.raises(BadRow, match=r"row 0 has a hint, which is not read"):
        rows.conversation({"row": 0})


def test_the_first_format_that_recognises_the_columns_reads_them(monkeypatch):
    both = {"messages", "conversations"}
    assert choose_format(both, "auto", "x").name == "messages"
    assert choose_format(both, "conversations", "x").name == "conversations"
    later = DataFormat("later", "messages", frozenset({"messages"}), parse_riddle, priority=99)
    monkeypatch.setitem(FORMATS, "later", later)
    assert choose_format(both, "auto", "x").name == "messages"
    with pytest.raises(UserError, match=r"columns \['text'\] fit no format \(chartqa: image, label, query; messages: "):
        choose_format({"text"}, "auto", "x")


@pytest.mark.parametrize(
    ("columns", "way_out"),
    [
        ({"instruction", "input", "output"}, "name instruction and output prompt and completion"),
        ({"query", "response", "images"}, "name query and response prompt and completion"),
        ({"question", "answer"}, "name question and answer prompt and completion"),
        ({"prompt", "chosen", "rejected"}, "preferences are not trained on"),
        ({"Prompt", " completion", "image"}, "names are read as they are written: correct ' completion', 'Prompt'"),
        ({"caption"}, "rename its columns to those of a format, or write its rows as messages"),
    ],
)
def test_columns_of_no_format_are_told_with_a_way_out(columns, way_out):
    with pytest.raises(UserError, match=way_out):
        choose_format(columns, "auto", "x")


def test_many_columns_of_no_format_are_told_in_short():
    with pytest.raises(UserError) as error:
        choose_format({f"column {number}" for number in range(900)}, "auto", "x")
    assert len(str(error.value)) < MOST_QUOTED + 300


@pytest.mark.parametrize("label", ["[Yes, No]", "[23, 18]", "['tis] the ['season", ["[23, 18]"], ['["a"]']])
def test_an_answer_in_brackets_is_text(label):
    chartqa = FORMATS["chartqa"]
    row = {"image": png(), "query": "Which?", "label": label}
    assert chartqa.accepted_answers(row, chartqa.read(row, None)) == (label if isinstance(label, list) else [label])


@pytest.mark.parametrize("label", ['["00501", "501"]', '["a"]', "['00501', '501']", "['14'\n '15']"])
def test_a_list_of_answers_that_was_written_as_text_is_refused(label):
    with pytest.raises(BadRow, match=r"has a list written as one text, .* write the list itself"):
        FORMATS["chartqa"].read({"image": png(), "query": "Which?", "label": label}, None)


def test_a_list_as_python_prints_it_is_refused():
    with pytest.raises(BadRow, match="a list as Python prints it"):
        FORMATS["messages"].read({"messages": "[{'role': 'user', 'content': 'x'}]"}, None)


def test_the_recipe_offers_every_format():
    message = "write a line for each module of data/formats into DATASET_FORMATS of config/settings.py"
    assert {name: found.help for name, found in FORMATS.items()} == DATASET_FORMATS, message
    (field,) = [field for field in fields(DataSettings) if field.name == "dataset_format"]
    assert field.metadata["help"] == (
        "chartqa: image, query, label; messages: messages and images; conversations: like messages, but each"
        " turn has from and value;"
        " prompt_completion: prompt, completion and images; auto: chosen by the columns"
    )


@pytest.mark.parametrize("found", FORMATS.values(), ids=FORMATS)
def test_a_format_reads_ignores_or_refuses_a_column(found):
    groups = [found.columns, found.optional, found.ignored, found.refused.keys()]
    assert all(not one & other for number, one in enumerate(groups) for other in groups[:number])
    assert all(message.startswith("has ") for message in found.refused.values())


def test_priorities_differ():
    assert all(one.priority < other.priority for one, other in pairwise(FORMATS.values()))


def test_a_recipe_tells_its_format_without_its_data():
    assert known_format("chartqa", None) is FORMATS["chartqa"]
    assert known_format("auto", "HuggingFaceM4/ChartQA") is FORMATS["chartqa"]
    assert known_format("auto", "me/photos") is None


def test_prompts_of_training_and_of_generation():
    def turn(role):
        return {"role": role, "content": [{"type": "text", "text": role}]}

    messages = [turn("user"), turn("assistant"), turn("assistant")]
    assert prompt_of(messages) == prompt_of(messages, 2) == messages[:2]
    assert prompt_of(messages, 1) == prompt_of(messages[:1]) == messages[:1]


@pytest.mark.parametrize("answers", [("red",), ("red", "blue"), ("a", "b", "c")])
def test_an_answer_is_generated_after_the_tokens_that_it_was_learned_after(answers, riddles, tiny_processor):
    turns = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in answers]
    encoder = Encoder(tiny_processor, "Be brief.")
    learned = encoder.encode(Conversation(turns, []))
    prompt = encoder.encode_prompt(Conversation(turns, []).up_to_last_answer()).input_ids.tolist()
    answer = tiny_processor.tokenizer(f"{answers[-1]}<|im_end|>")["input_ids"]
    assert learned.input_ids.tolist()[: len(prompt) + len(answer)] == prompt + answer
    assert learned.labels.tolist()[len(prompt) : len(prompt) + len(answer)] == answer


def compared_texts(source):
    """Yield the texts that a module compares anything with."""
    for comparison in ast.walk(ast.parse(source)):
        if isinstance(comparison, ast.Compare | ast.MatchValue):
            yield from (node.value for node in ast.walk(comparison) if isinstance(node, ast.Constant))


def test_no_other_module_compares_with_the_name_of_a_format():
    assert "chartqa" in compared_texts('if name == "chartqa" or {"x"} == names: pass')
    package = REPOSITORY / "src/qwen_vl_sft"
    for path in {*package.rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py")} - {
        *(package / "data/formats").glob("*.py")
    }:
        assert not FORMATS.keys() & set(compared_texts(path.read_text(encoding="utf-8"))), path
