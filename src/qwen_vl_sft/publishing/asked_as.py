"""How the evaluation of a publication asked: with the prompt and the pixel limits of what is published, or otherwise."""

from __future__ import annotations

import json

from qwen_vl_sft.publishing.card_usage import pixel_limits
from qwen_vl_sft.publishing.publication import Publication


def evaluated_with_its_prompt(publication: Publication) -> bool:
    """Whether there is an evaluation, and it put the published system message before its questions."""
    summary = publication.evaluation
    return summary is not None and summary["settings"]["system_message"].strip() == publication.system_message


def other_settings(publication: Publication) -> list[str]:
    """What the evaluation set otherwise than the published files do, in words; empty without an evaluation."""
    if publication.evaluation is None:
        return []
    settings, found = publication.evaluation["settings"], []
    if not evaluated_with_its_prompt(publication):
        message = settings["system_message"].strip()
        said = f"the system message {json.dumps(message, ensure_ascii=False)}" if message else "no system message"
        found.append(f"{said} instead of the one below" if publication.system_message else said)
    for name, limit in pixel_limits(publication).items():
        if settings[name] != limit:
            found.append(f"`{name}` {settings[name]:,} instead of {limit:,}")
    return found
