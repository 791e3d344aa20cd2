"""What an engine declares, what it is asked, and what it answers.

An engine runs in a Python environment of its own and in a process of its own: its worker, a script that imports nothing of
this package but `worker_protocol.py` beside it. Both sides write one JSON value a line:

    to the worker                                            from it
    {"model", "adapter", "arguments"}                        {"ready": {name: version}}, {"refused": why} or {"failed": why}
    {"prompts": [...], "with_adapter", "max_new_tokens",     {"answers": [...]}, {"refused": why} or {"failed": why}
     "template_options"}

A prompt is `EnginePrompt` and an answer `EngineAnswer`, field by field. `refused` is what the engine says of the model or the
adapter, `failed` everything else. The worker ends when its standard input does; what libraries print goes to its standard
error, which is kept in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "workers"
REQUIREMENTS = Path(__file__).parent / "requirements"


@dataclass(frozen=True)
class EnginePrompt:
    """The prompt of one row: `messages` as in `Conversation`, and the files of the images that they show, in order."""

    number: int
    messages: list[dict[str, Any]]
    images: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine answered to the prompt of the same number.

    `prompt_ids` are all tokens of the prompt, those of images included; None where the engine tells their number alone.
    `answer_ids` are the tokens of the answer, None where it tells its text alone. With `whole_characters` those after which
    the text ends within a character are not among them.
    """

    number: int
    text: str
    prompt_tokens: int
    prompt_ids: list[int] | None = None
    answer_ids: list[int] | None = None
    whole_characters: bool = False


@dataclass(frozen=True)
class Served:
    """A model as an engine serves it.

    `model` is the folder of a whole model: the base of an `adapter`, or a merged one. `lora_config` is the adapter's
    configuration, and `changes_vision` tells whether it reaches the vision tower or the merger. `limits` are the limits of
    image sizes that the engine has to be told, as a processor's `size` has them; empty where its model's folder has them.
    """

    model: Path
    dtype: str
    adapter: Path | None = None
    lora_config: dict[str, Any] | None = None
    changes_vision: bool = False
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """What the rows of a check ask of an engine: tokens of the longest prompt and answer, images of one row."""

    tokens: int
    images: int


@dataclass(frozen=True)
class ServingEngine:
    """An engine.

    Attributes:
        name: as on the command line.
        title: as people write it.
        package: the Python package whose version is stated.
        requirements: file of `REQUIREMENTS` with the pinned packages of its environment.
        worker: file of `WORKERS`.
        arguments: the options that a model needs to be served as it was trained; a card's command has them too.
        check_arguments: further options for a check on this machine.
        refuses: why the engine cannot take a model, as far as that is known before it is tried; None otherwise.
        after_install: what is done to a new environment, given its folder of packages (site-packages); None for nothing.
        before_use: the same, each time before it is used.
        gguf: it serves GGUF files and nothing else; those do not hold the limits of image sizes, so it is told them.
    """

    name: str
    title: str
    package: str
    requirements: str
    worker: str
    arguments: Callable[[Served], list[str]]
    check_arguments: Callable[[Served, Size], list[str]]
    refuses: Callable[[Served], str | None]
    after_install: Callable[[Path], None] | None = None
    before_use: Callable[[Path], None] | None = None
    gguf: bool = False

    @property
    def pinned(self) -> str:
        """Return the version of its package that its requirements name."""
        lines = (REQUIREMENTS / self.requirements).read_text(encoding="utf-8").splitlines()
        return next(line.partition("==")[2].strip() for line in lines if line.startswith(f"{self.package}=="))
