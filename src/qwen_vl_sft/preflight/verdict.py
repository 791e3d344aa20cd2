"""Judge the nodes of a job by what their processes have found, and write the verdict for the job's script."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen_vl_sft.errors import shortened
from qwen_vl_sft.preflight.node import Facts

# A GPU of less than this share of the others' speed holds all of them up.
SLOW = 0.7
MOST_NAMES = 5


@dataclass(frozen=True)
class AddedUp:
    """How the all-reduce ended: bytes/s of each link that it kept busy, and what failed first, by rank."""

    bandwidth: float | None = None
    failed: Mapping[int, str] = field(default_factory=dict)


@dataclass
class Verdict:
    """What is wrong with which nodes, and with the job as a whole."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def blame(self, node: str, *faults: str) -> None:
        """Add faults of a node, if there are any."""
        if faults:
            self.faults.setdefault(node, []).extend(faults)

    def line(self) -> str:
        """Return "pass", "exclude NODE,NODE" or "fail", which the job's script reads."""
        if self.failures:
            return "fail"
        return f"exclude {','.join(sorted(self.faults))}" if self.faults else "pass"


def judge_nodes(found: Sequence[Facts], nodes: Sequence[str], processes: int) -> Verdict:
    """Judge what each node has found by itself.

    Args:
        found: of the processes that answered.
        nodes: of the job; empty where they are not known.
        processes: that there should be.
    """
    verdict = Verdict()
    wanted = processes // max(len(nodes), 1)
    for node in nodes:
        answered = sum(facts.node == node for facts in found)
        if answered < wanted:
            verdict.blame(node, f"{answered} of its {wanted} processes answered")
    if not nodes and len(found) < processes:
        verdict.failures.append(f"{len(found)} of {processes} processes answered")
    for facts in found:
        verdict.blame(facts.node, *facts.faults)
    _judge_speed(found, verdict)
    _judge_folders([facts for facts in found if facts.local_rank == 0], verdict)
    return verdict


def _judge_speed(found: Sequence[Facts], verdict: Verdict) -> None:
    for facts in found:
        others = [one.product for one in found if one is not facts and one.device == facts.device and one.product]
        # Processes of one machine share its CPUs, so that their speed says little of it.
        if facts.device == "CPU" or not others or not facts.product:
            continue
        median = statistics.median(others)
        if facts.product < SLOW * median:
            verdict.blame(
                facts.node,
                f"GPU {facts.local_rank} ({facts.device}): {facts.product / 1e12:.0f} TFLOP/s, where the others reach"
                f" {median / 1e12:.0f}",
            )


def _judge_folders(first: Sequence[Facts], verdict: Verdict) -> None:
    """Judge folders by whether other nodes can use them: what none can is no fault of a node."""
    for name in ("output_dir", "HF_HOME"):
        able = [facts.node for facts in first if name not in facts.refused]
        refused = [facts for facts in first if name in facts.refused]
        if able:
            for facts in refused:
                verdict.blame(facts.node, f"{name}: {facts.refused[name]}; it can on {able[0]}")
        elif refused and name == "output_dir":
            verdict.failures.append(f"output_dir: {refused[0].refused[name]}, on any node; name another folder")
    filled = next((facts for facts in first if facts.cached), None)
    for facts in first:
        # Some names may be too new to be seen on every node yet, but not all of them.
        if filled is not None and not facts.cached and "HF_HOME" not in facts.refused:
            shown = shortened(", ".join(filled.cached[:MOST_NAMES]))
            verdict.blame(facts.node, f"HF_HOME: shows no models or data, where {filled.node} shows {shown}")


def judge_sight(found: Sequence[Facts], sees: Mapping[int, bool], output_dir: str, verdict: Verdict) -> None:
    """Judge whether nodes see what the first process wrote to output_dir; `sees` is by rank, for those that looked."""
    for rank, seen in sees.items():
        if not seen:
            verdict.blame(
                found[rank].node,
                f"output_dir: what {found[0].node} writes to {output_dir} is not seen; it must be on shared storage",
            )


def judge_all_reduce(found: Sequence[Facts], added_up: AddedUp, verdict: Verdict) -> None:
    """Judge the all-reduce: a node whose process fails by itself is to blame, a timeout of all is nobody's."""
    for rank, reason in added_up.failed.items():
        verdict.blame(found[rank].node, f"all-reduce: {shortened(reason)}")
    if not added_up.failed and added_up.bandwidth is None:
        verdict.failures.append(
            "the all-reduce did not end, and no node failed by itself: set NCCL_DEBUG=INFO to see why; NCCL_SOCKET_IFNAME"
            " and NCCL_IB_HCA name the network to use"
        )


def common_adapters(found: Sequence[Facts]) -> str | None:
    """Return the value of NCCL_IB_HCA that all nodes come to; None where they differ, or NCCL should choose."""
    values = {facts.adapters for facts in found}
    return values.pop() if len(values) == 1 else None


def format_page(found: Sequence[Facts], verdict: Verdict, added_up: AddedUp | None) -> str:
    """Return the page: a line for the nodes that are well, a line for each fault and note."""
    nodes = list(dict.fromkeys(facts.node for facts in found))
    well = [node for node in nodes if node not in verdict.faults]
    lines = [f"preflight   {len(well)} of {len(set(nodes) | set(verdict.faults))} nodes are well{_rates(found)}"]
    if added_up is not None and added_up.bandwidth:
        lines.append(f"            all-reduce over {len(found)} processes: {added_up.bandwidth / 1e9:.2f} GB/s")
    if adapters := common_adapters(found):
        lines.append(f"            NCCL_IB_HCA={adapters}: the fastest ports of each node")
    lines += [f"            {facts.node}: {note}" for facts in found for note in facts.notes]
    lines += [f"          ! {node}: {fault}" for node, faults in verdict.faults.items() for fault in faults]
    lines += [f"          ! {failure}" for failure in verdict.failures]
    return "\n".join(lines)


def _rates(found: Sequence[Facts]) -> str:
    by_device: dict[str, list[float]] = defaultdict(list)
    for facts in found:
        if facts.product and facts.device != "CPU":
            by_device[facts.device].append(facts.product / 1e12)
    shown = [
        f"{len(rates)} x {device} at {min(rates):.0f} to {max(rates):.0f} TFLOP/s"
        for device, rates in by_device.items()
    ]
    return "; " + ", ".join(shown) if shown else ""
