"""Self-contained pages: templates, tables, their common style, and data for their scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Return a template with each `{{name}}` replaced by a part, `{{base_style}}` by the style of all pages.

    Parts are HTML: texts of others must be escaped.
    """
    known = {"base_style": asset("qwen_vl_sft", "html_page.css"), **parts}
    # One pass: a text that holds a marker itself is not filled in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: known[match[1]], template)


def asset(package: str, name: str) -> str:
    """Return the text of a file that lies beside a package's modules."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def facts_list(facts: Mapping[str, Any]) -> str:
    """Return names and values as a list; those without a value are left out."""
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value
    )
    return f"<dl>{shown}</dl>"


def table(label: str, headings: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table of HTML cells; what is wider than the page scrolls, also by keyboard."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    lines = "".join(
        f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"
        for cells in body
    )
    made = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide" role="region" tabindex="0" aria-label="{label}">{made}</div>'


def to_script_json(value: Any) -> str:
    """Return JSON that is safe inside `<script>`: none of its texts can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate, which JSON answers may carry, has no UTF-8 form.
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
