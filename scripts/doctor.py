"""Check this machine: what is installed, what works, and how to mend the rest.

    python scripts/doctor.py
    python scripts/doctor.py --runs false

One page, fit to be pasted into an issue: it holds no token and no user's name.
Exit code 1 when there is a problem.
"""

from __future__ import annotations

import json

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.diagnosis.checks import CHECKS, PROBLEM, check_runs
from qwen_vl_sft.diagnosis.machine import Machine
from qwen_vl_sft.diagnosis.options import DoctorOptions
from qwen_vl_sft.diagnosis.report import as_json, clean, format_end, format_head, format_line
from qwen_vl_sft.errors import exits_with_user_errors


@exits_with_user_errors
def main() -> None:
    """Print each finding as it is made."""
    options = parse(DoctorOptions, usage=__doc__)
    machine, findings = Machine(), []
    if not options.json:
        print(format_head())
    for check in CHECKS:
        if check is check_runs and not options.runs:
            continue
        for found in check(machine):
            finding = clean(found, machine.environment, machine.home)
            findings.append(finding)
            if not options.json:
                print(format_line(finding), flush=True)
    print(json.dumps(as_json(findings), indent=1) if options.json else format_end(findings))
    if any(finding.state == PROBLEM for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
