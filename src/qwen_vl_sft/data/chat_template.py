"""A model's chat template and tokenizer: messages as text and token ids, without forged turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from qwen_vl_sft.data.conversation import Message
from qwen_vl_sft.data.thoughts import thought_apart
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.families.base import ChatFormat

RESULTS = "results of tools"
# What messages may have beside their role and content, and the template's end of each refusal.
_BESIDE = ("tool_calls", "reasoning_content", "name")
_NOT_SHOWN = "the model's chat template does not show; leave such rows out, or train a model whose template does"


class ChatTemplate:
    """Renders and tokenizes messages.

    Args:
        processor: a processor of the Qwen-VL family, with its tokenizer and chat template.
        chat: the model family's special tokens and template options.
    """

    def __init__(self, processor: Any, chat: ChatFormat) -> None:
        self._processor = processor
        self.chat = chat
        self.vocabulary: dict[str, int] = processor.tokenizer.get_vocab()
        self.end_of_turn_id = self.vocabulary[chat.end_of_turn]

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """Render messages as text, with one token for each picture that they show."""
        return self.render_each([messages], add_generation_prompt, tools)[0]

    def render_each(
        self,
        conversations: list[list[Message]],
        add_generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[str]:
        """Render several conversations, which is faster than one after another."""
        if not conversations:
            return []
        asked = [[thought_apart(self.chat, message) for message in messages] for messages in conversations]
        texts: list[str] = self._processor.apply_chat_template(
            asked,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.chat.template_options,
        )
        return texts

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of rendered text."""
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def ids_of(self, tokens: tuple[str, ...]) -> list[int]:
        """Return the ids of those special tokens that the model has."""
        return [self.vocabulary[token] for token in tokens if token in self.vocabulary]

    @cached_property
    def shows(self) -> frozenset[str]:
        """Return what the template shows beside roles and contents: tools, tool_calls, reasoning_content, name, results.

        Found by rendering each in a conversation of its own: some templates leave out in silence what they do not know.
        """
        word = "zyx"

        def shown(answer: Message, asked: Message | None = None, tools: Sequence[dict[str, Any]] = ()) -> str:
            turns: list[Message] = [
                {"role": "user", **_said("a"), **(asked or {})},
                {"role": "assistant", **_said("b")},
            ]
            turns = [*turns, answer] if answer.get("role") else [turns[0], {**turns[1], **answer}]
            try:
                return self.render(turns, tools=tools)
            except TemplateError:
                return ""

        function = {"name": word, "description": "", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "function": {"name": word, "arguments": {}}}
        found = {
            "tools": word in shown({}, tools=[{"type": "function", "function": function}]),
            "tool_calls": word in shown({"tool_calls": [call]}),
            "reasoning_content": word in shown({"reasoning_content": word}),
            "name": word in shown({"name": word}) and word in shown({}, {"name": word}),
        }
        result, other = shown({"role": "tool", **_said("c")}), shown({"role": word, **_said("c")})
        # A template that writes any role as it is knows none of them.
        found[RESULTS] = result not in ("", other.replace(word, "tool"), shown({}))
        return frozenset(name for name, is_shown in found.items() if is_shown)

    def check(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Raise `BadRow` for what the template does not show, and for a text with a structural token.

        Such a token would forge a turn or an image.
        """
        if tools and "tools" not in self.shows:
            raise BadRow(f"has something in column tools, which {_NOT_SHOWN}")
        for message in messages:
            beside = [name for name in _BESIDE if name in message]
            for name in beside:
                if name not in self.shows:
                    raise BadRow(f"has a turn with something in {name!r}, which {_NOT_SHOWN}")
            if message["role"] == "tool" and RESULTS not in self.shows:
                raise BadRow(f"has a message of role 'tool', which {_NOT_SHOWN}")
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            self._check_text(
                [*texts, *(message[name] for name in beside)], f"the text of its {message['role']} message"
            )
        self._check_text(list(tools), "its tools")

    def _check_text(self, value: Any, where: str) -> None:
        if isinstance(value, str):
            for token in self.chat.structural:
                if token in value:
                    raise BadRow(f"has the special token {token} inside {where}")
        elif isinstance(value, Mapping):
            self._check_text([*value, *value.values()], where)
        elif isinstance(value, list):
            for entry in value:
                self._check_text(entry, where)


def _said(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}


def with_system_message(messages: list[Message], system_message: str | None) -> list[Message]:
    """Put a system message before messages that have none."""
    if system_message is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": system_message}]}, *messages]
