"""The page of findings, fit to be shown to others: no token, no name of a user or a machine."""

from __future__ import annotations

import re
import socket
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_vl_sft import __version__
from qwen_vl_sft.diagnosis.checks import NOTE, OK, PROBLEM, Finding
from qwen_vl_sft.errors import shortened

WIDTH = 80
_MARKS = {OK: "  ", NOTE: "- ", PROBLEM: "! "}
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.I)
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9_]{4,}|(?i:bearer)\s+\S+|://[^/\s:@]+:[^/\s@]+@")


def clean(finding: Finding, environment: Mapping[str, str], home: Path) -> Finding:
    """Return a finding without secrets of the environment, tokens, the home folder's and the machine's name."""
    secrets = sorted((value for name, value in environment.items() if _SECRET_NAME.search(name)), key=len, reverse=True)

    def cleaned(text: str) -> str:
        for secret in secrets:
            if len(secret) >= 6:
                text = text.replace(secret, "***")
        text = _SECRET.sub("***", text)
        for name, shown in ((str(home), "~"), (socket.gethostname(), "HOST")):
            if len(name) > 3:
                text = text.replace(name, shown)
        return shortened(" ".join(text.split()))

    return Finding(finding.subject, finding.state, cleaned(finding.text), cleaned(finding.cure))


def format_line(finding: Finding) -> str:
    """Return a finding as lines of at most 80 columns, its cure below."""
    first = f"{_MARKS[finding.state]}{finding.subject:<18}"
    lines = _wrapped(first + finding.text)
    if finding.cure:
        lines += _wrapped(f"{'':<20}cure: {finding.cure}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 20, drop_whitespace=True, break_on_hyphens=False) or [
        text
    ]


def format_head() -> str:
    """Return the first line of the page."""
    return f"qwen_vl_sft {__version__}: {_MARKS[PROBLEM].strip()} problem, {_MARKS[NOTE].strip()} note"


def format_end(findings: Iterable[Finding]) -> str:
    """Return the last line: how many problems there are."""
    count = sum(finding.state == PROBLEM for finding in findings)
    return "no problem was found" if not count else f"{count} problem{'s' if count > 1 else ''}"


def as_json(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the findings for JSON."""
    return {"version": __version__, "findings": [asdict(finding) for finding in findings]}
