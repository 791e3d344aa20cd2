"""What rows bring beside plain turns is read, or refused by its name: nothing falls away in silence."""

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from fixtures.messages import conversation_row, png, write_messages
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats import FORMATS
from qwen_vl_sft.data.formats.bookkeeping import is_bookkeeping
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.task import read_question

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
CHART = {"image": png(), "query": "What?", "label": "red"}
ROWS = {
    "messages": {"messages": TURNS},
    "conversations": {"conversations": SAID},
    "chartqa": CHART,
    "prompt_completion": {"prompt": "What?", "completion": "red"},
}
TOOL = {"type": "function", "function": {"name": "zoom", "description": "Zoom in.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"factor": 2}}}
SHOWN_CALL = '<tool_call>\n{"name": "zoom", "arguments": {"factor": 2}}\n</tool_call>'


def read(row, folder=None):
    (found,) = [name for name in ("messages", "conversations", "prompt_completion") if FORMATS[name].columns <= {*row}]
    return FORMATS[found].read(row, folder)


def texts(conversation):
    return ["".join(part.get("text", "") for part in message["content"]) for message in conversation.messages]


@pytest.fixture
def with_tools(tiny_processor, monkeypatch):
    """Return a processor whose chat template knows tools, as that of Qwen3-VL."""
    template = Path(trl.__file__).parent / "chat_templates/qwen3_vl.jinja"
    monkeypatch.setattr(tiny_processor, "chat_template", template.read_text())
    return tiny_processor


def learned(processor, encoded):
    return processor.tokenizer.decode(encoded.labels[encoded.labels != -100])


@pytest.mark.parametrize("name", ROWS)
def test_a_system_message_in_its_column_is_the_first_turn(name):
    conversation = FORMATS[name].read({**ROWS[name], "system": "Answer in French."}, None)
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert texts(conversation)[0] == "Answer in French."
    assert texts(FORMATS[name].read({**ROWS[name], "system": ""}, None)) == ["What?", "red"]
    with pytest.raises(BadRow, match="other than text in column system"):
        FORMATS[name].read({**ROWS[name], "system": ["x"]}, None)


def test_a_system_message_stands_in_one_place():
    system = {"role": "system", "content": "x"}
    for row in ({"messages": [system, *TURNS]}, {"prompt": [system, TURNS[0]], "completion": "red"}):
        with pytest.raises(BadRow, match="both in its turns and in column system"):
            read({**row, "system": "y"})


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "column", ["functions", "rejected", "chosen", "history", "loss_weight", "mask", "channel", "description"]
)
def test_columns_that_are_not_read_are_refused_by_name(name, column):
    found = FORMATS[name]
    with pytest.raises(BadRow, match=f"in column {column}, which is not read; .*list it in ignored_columns"):
        found.read({**ROWS[name], column: [{"a": 1}]}, None)
    for empty in (None, "", [], {"a": None}, [None]):
        assert found.read({**ROWS[name], column: empty}, None)
    assert found.ignoring([column]).read({**ROWS[name], column: "x"}, None)


def test_columns_that_are_read_are_not_ignored():
    with pytest.raises(UserError, match="ignored_columns: images, system is read by the format messages"):
        FORMATS["messages"].ignoring(["system", "images", "x"])
    assert FORMATS["messages"].ignoring(["video"]).read({"messages": TURNS, "video": "a.mp4"}, None)


def test_columns_of_bookkeeping_are_ignored_and_listed(tmp_path):
    rows = [{**conversation_row(), "id": "a"}, {**conversation_row(), "Note": 1, "question_id": 5, "system": "x"}]
    folder = write_messages(tmp_path, rows)
    found = open_rows(str(folder), "train", ignored_columns=["hint"])
    assert found.ignored_columns == ("Note", "id", "question_id")
    assert found.select([0]).ignored_columns == ("Note", "id", "question_id")
    assert texts(found.conversation({"row": 1})) == ["x", "Which color?", "red"]


@pytest.mark.parametrize(
    "name",
    ["ID", "source", "split", "data_source", "num_turns", "chart_type", "__index_level_0__", "Unnamed: 0", "Score"],
)
def test_names_of_bookkeeping(name):
    assert is_bookkeeping(name)


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "loss_weight",
        "kto_tag",
        "input_ids",
        "label",
        "image_path",
        "url",
        "text",
        "context",
        "answer",
        "tools",
        "idea",
    ],
)
def test_other_names_mean_something(name):
    assert not is_bookkeeping(name)


@pytest.mark.parametrize("key", ["images", "function_call", "channel", "loss_mask", "unheard_of"])
def test_keys_of_turns_are_refused_by_name(key):
    for row in (
        {"messages": [TURNS[0], {**TURNS[1], key: "x"}]},
        {"conversations": [{**SAID[0], key: ["x"]}, SAID[1]]},
        {"prompt": [{**TURNS[0], key: 0}], "completion": "red"},
    ):
        with pytest.raises(BadRow, match=f"something in '{key}', which is not read"):
            read(row)
    assert read({"messages": [TURNS[0], {**TURNS[1], key: None, "id": 5, "timestamp": 7}]})


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("loss", False, True), ("train", False, True)])
def test_a_turn_that_is_not_to_be_learned_is_not(key, no, yes, tiny_processor):
    turns = [TURNS[0], {"role": "assistant", "content": "draft", key: no}, TURNS[0], {**TURNS[1], key: yes}]
    said = [SAID[0], {"from": "gpt", "value": "draft", key: no}, SAID[0], {**SAID[1], key: yes}]
    for row in ({"messages": turns}, {"conversations": said}, {"prompt": turns[:1], "completion": turns[1:]}):
        encoded = Encoder(tiny_processor).encode(read(row))
        assert learned(tiny_processor, encoded) == "red<|im_end|>"
        assert "draft" in tiny_processor.tokenizer.decode(encoded.input_ids)
    with pytest.raises(BadRow, match="train_on: all learns them all"):
        Encoder(tiny_processor, train_on="all").encode(read({"messages": turns}))
    with pytest.raises(BadRow, match="no assistant turn that is to be learned"):
        read({"messages": turns[:2]})
    with pytest.raises(BadRow, match="role 'user' that is to be learned"):
        read({"messages": [{**TURNS[0], key: yes}, TURNS[1]]})
    for wrong in (0.5, 2, -1, "1"):
        with pytest.raises(BadRow, match=f"a turn with {key}: {wrong!r}; only"):
            read({"messages": [TURNS[0], {**TURNS[1], key: wrong}]})


def test_keys_that_do_not_agree_on_what_is_learned_are_refused():
    with pytest.raises(BadRow, match="weight and loss and train do not agree"):
        read({"messages": [TURNS[0], {**TURNS[1], "weight": 0, "train": True}]})


def test_an_evaluation_scores_the_last_answer_that_is_learned():
    turns = [*TURNS, TURNS[0], {"role": "assistant", "content": "draft", "weight": 0}]
    asked = read({"messages": turns}).up_to_last_answer()
    assert texts(asked) == ["What?", "red"]
    assert asked.last_answer == "red"


def test_conversations_may_have_turns_of_messages():
    conversation = read({"conversations": [{"from": None, "value": None, **TURNS[0]}, TURNS[1]], "system": "x"})
    assert texts(conversation) == ["x", "What?", "red"]
    with pytest.raises(BadRow, match="something in 'mask'"):
        read({"conversations": [{**TURNS[0], "mask": 1}, TURNS[1]]})


@pytest.mark.parametrize("prompt", ["What?", [{"role": "user", "content": "What?"}]])
@pytest.mark.parametrize("completion", ["red", [{"role": "assistant", "content": "red"}]])
def test_prompts_with_completions(prompt, completion, tmp_path):
    conversation = read({"prompt": prompt, "completion": completion, "images": ["a.png"]}, tmp_path)
    assert texts(conversation) == ["What?", "red"]
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    with pytest.raises(BadRow, match="a completion that is neither text nor a list of turns"):
        read({"prompt": prompt, "completion": {"a": 1}})


def test_of_a_prompt_nothing_is_learned(tiny_processor):
    with pytest.raises(BadRow, match="a prompt with a turn that is to be learned, and only the completion is"):
        read({"prompt": [TURNS[0], {**TURNS[1], "weight": 1}, TURNS[0]], "completion": "red"})
    prompt = [TURNS[0], {"role": "assistant", "content": "draft"}, TURNS[0]]
    encoded = Encoder(tiny_processor).encode(read({"prompt": prompt, "completion": "red"}))
    assert learned(tiny_processor, encoded) == "red<|im_end|>"


TALK = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]},
    {"role": "tool", "name": "zoom", "tool_call_id": "1", "content": "closer"},
    TURNS[1],
]


def test_tools_and_calls_are_shown_and_learned_where_the_template_has_them(with_tools):
    encoder = Encoder(with_tools)
    encoded = encoder.encode(read({"messages": TALK, "tools": [TOOL]}))
    assert learned(with_tools, encoded) == f"{SHOWN_CALL}<|im_end|>red<|im_end|>"
    text = with_tools.tokenizer.decode(encoded.input_ids)
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert "<|im_start|>user\n<tool_response>\ncloser\n</tool_response><|im_end|>" in text
    prompt = encoder.encode_prompt(read({"messages": TALK, "tools": [TOOL]}).up_to_last_answer()).input_ids.tolist()
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt
    said = {"role": "assistant", "content": "Let me zoom.", "tool_calls": [CALL]}
    encoded = encoder.encode(read({"messages": [TURNS[0], said]}))
    assert learned(with_tools, encoded) == f"Let me zoom.\n{SHOWN_CALL}<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "tools": json.dumps([TOOL])},
        {
            "messages": [TALK[0], {**TALK[1], "tool_calls": json.dumps([CALL])}, *TALK[2:]],
            "tools": [{**TOOL, "x": None}],
        },
        {
            "messages": [TALK[0], {**TALK[1], "tool_calls": [CALL["function"]], "content": ""}, *TALK[2:]],
            "tools": [TOOL],
        },
        {"prompt": TALK[:1], "completion": TALK[1:], "tools": [TOOL]},
        {
            "conversations": [
                SAID[0],
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "closer"},
                SAID[1],
            ],
            "tools": json.dumps([TOOL]),
        },
    ],
)
def test_forms_of_tools_that_mean_the_same(row, with_tools):
    encoder = Encoder(with_tools)
    expected = encoder.encode(read({"messages": TALK, "tools": [TOOL]}))
    found = encoder.encode(read(row))
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()


def test_tools_of_parquet_are_those_of_json(with_tools, tmp_path):
    other = {"type": "function", "function": {"name": "turn", "parameters": {"type": "object", "required": ["side"]}}}
    call = {"type": "function", "function": {"name": "turn", "arguments": {"side": "left"}}}
    rows = [
        {"messages": TALK, "tools": [TOOL, other], "system": None},  # `from_list` takes the columns of the first row
        {"messages": [TURNS[0], {"role": "assistant", "content": "So.", "tool_calls": [call, CALL], "weight": 1}]},
        {"messages": TURNS, "system": "Be brief."},
    ]
    (tmp_path / "json").mkdir()
    (tmp_path / "json/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "parquet").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "parquet/train-00000-of-00001.parquet"))
    encoder = Encoder(with_tools)
    json_rows, parquet_rows = (open_rows(str(tmp_path / name), "train") for name in ("json", "parquet"))
    for index in range(len(rows)):
        one, same = (found.encode({"row": index}, encoder) for found in (json_rows, parquet_rows))
        assert one.input_ids.tolist() == same.input_ids.tolist()
        assert one.labels.tolist() == same.labels.tolist()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tools": [TOOL]}, "in column tools, which the model's chat template does not show"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [CALL]}]}, "in 'tool_calls', which the model's chat"),
        (
            {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "So."}]},
            "in 'reasoning_content', which the model's",
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "thinking": "So."}]}, "in 'reasoning_content', which the model's"),
        ({"messages": [{**TURNS[0], "name": "Ann"}, TURNS[1]]}, "in 'name', which the model's chat template"),
        (
            {"messages": [*TURNS, {"role": "tool", "content": "x"}, TURNS[1]]},
            "role 'tool', which the model's chat template",
        ),
    ],
)
def test_what_the_chat_template_does_not_show_is_refused_by_name(changes, told, tiny_processor):
    with pytest.raises(BadRow, match=told):
        Encoder(tiny_processor).encode(read({"messages": TURNS, **changes}))


def test_a_template_without_thoughts_refuses_them(with_tools):
    assert Encoder(with_tools)._template.shows == {"tools", "tool_calls", "results of tools"}


def test_thoughts_are_learned_where_the_template_has_them(tiny_processor, monkeypatch):
    template = Path(trl.__file__).parent / "chat_templates/qwen3_5_think.jinja"
    monkeypatch.setattr(tiny_processor, "chat_template", template.read_text())
    encoder = Encoder(tiny_processor)
    written = encoder.encode(read({"messages": [TURNS[0], {**TURNS[1], "content": "<think>It is.</think>red"}]}))
    for name in ("reasoning_content", "reasoning", "thinking"):
        encoded = encoder.encode(read({"messages": [TURNS[0], {**TURNS[1], name: "It is."}]}))
        assert learned(tiny_processor, encoded) == "It is.\n</think>\n\nred<|im_end|>"
        assert encoded.input_ids.tolist() == written.input_ids.tolist()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": TURNS, "tools": "zoom"}, "in column tools that is no list of functions"),
        ({"messages": TURNS, "tools": {"a": 1}}, "in column tools that is no list of functions"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": "zoom"}]}, "whose tool_calls are no list of calls"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"a": 1}]}]}, "a call of a tool without a name"),
        (
            {"messages": [{**TURNS[0], "tool_calls": [CALL]}, TURNS[1]]},
            "role 'user' with something in 'tool_calls', which answers",
        ),
        (
            {"messages": [{**TURNS[0], "thinking": "x"}, TURNS[1]]},
            "role 'user' with something in 'thinking', which answers",
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "thinking": "x", "reasoning": "x"}]}, "reasoning and thinking; keep one"),
        ({"messages": [TURNS[0], {**TURNS[1], "reasoning": ["x"]}]}, "other than text in 'reasoning'"),
        ({"messages": [{**TURNS[0], "tool_call_id": "1"}, TURNS[1]]}, "role 'user' with something in 'tool_call_id'"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "x"}, TURNS[1]]}, "role 'tool' that follows no answer"),
        (
            {"messages": [TURNS[0], {"role": "function", "content": "x"}, TURNS[1]]},
            "a message of role 'function'; known",
        ),
        ({"conversations": [SAID[0], {"from": "function_call", "value": "zoom"}]}, "no JSON of a name and arguments"),
        (
            {
                "messages": [
                    TURNS[0],
                    {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}, {**CALL, "id": "2"}]},
                    {"role": "tool", "tool_call_id": "2", "content": "b"},
                    {"role": "tool", "tool_call_id": "1", "content": "a"},
                    TURNS[1],
                ]
            },
            "results of tools in another order than their calls",
        ),
    ],
)
def test_tools_that_cannot_be_read_are_told(row, told):
    with pytest.raises(BadRow, match=told):
        read(row)


FORGED = {"type": "function", "function": {"name": "zoom", "arguments": {"a": ["<|im_end|>"]}}}


@pytest.mark.parametrize(
    "row", [{"messages": TALK, "tools": [FORGED]}, {"messages": [TURNS[0], {**TALK[1], "tool_calls": [FORGED]}]}]
)
def test_tools_hold_no_structural_tokens(row, with_tools):
    with pytest.raises(BadRow, match=r"has the special token <\|im_end\|> inside"):
        Encoder(with_tools).encode(read(row))


def test_no_metric_scores_a_call():
    conversation = read({"messages": TALK[:2]}).up_to_last_answer()
    with pytest.raises(BadRow, match="ends with the call of a tool, which no metric scores"):
        read_question({"row_id": 0}, conversation, FORMATS["messages"])
