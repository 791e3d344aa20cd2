"""A model's chat template and tokenizer: messages as text and token ids, without forged turns."""

from __future__ import annotations

from typing import Any

from qwen_vl_sft.data.conversation import Message
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.families.base import ChatFormat


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

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render messages as text, with one token for each picture that they show."""
        text = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self.chat.template_options
        )
        assert isinstance(text, str)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of rendered text."""
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def ids_of(self, tokens: tuple[str, ...]) -> list[int]:
        """Return the ids of those special tokens that the model has."""
        return [self.vocabulary[token] for token in tokens if token in self.vocabulary]

    def check_texts(self, messages: list[Message]) -> None:
        """Raise `BadRow` for a text that holds a structural token, which would forge a turn or an image."""
        for message in messages:
            for part in message["content"]:
                for token in self.chat.structural if part["type"] == "text" else ():
                    if token in part["text"]:
                        raise BadRow(f"has the special token {token} inside the text of its {message['role']} message")


def with_system_message(messages: list[Message], system_message: str | None) -> list[Message]:
    """Put a system message before messages that have none."""
    if system_message is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": system_message}]}, *messages]
