"""Format the results of all strategies: a line a run, one table, the loss curves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.tools.measuring import TEXT, format_table

COLUMNS = {
    "mode": ("mode", TEXT),
    "strategy": ("strategy", TEXT),
    "processes": ("procs", "{:d}"),
    "rows_per_second": ("rows/s", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "times_first": ("times", "{:.2f}"),
    "mfu": ("MFU", "{:.1%}"),
    "tflops_per_gpu": ("TFLOP/s", "{:.0f}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "data_wait": ("wait", "{:.1%}"),
    "loss_difference": ("loss ±", "{:.0e}"),
    "grad_norm_difference": ("grad ±", "{:.0e}"),
    "weights_difference": ("weights ±", "{:.0e}"),
    "resumed": ("resumed", TEXT),
    "outcome": ("", TEXT),
}
WIDTH = 80
# What coincides is drawn thick below and thin above, so that every curve shows.
WIDEST, NARROWEST = 6.0, 1.2
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
SMALLEST = 1e-9  # the log axis begins here, and equal losses are drawn on it


def line(result: Mapping[str, Any]) -> str:
    """Format a run in one line of a terminal."""
    name = f"{result['run']:<18}"
    if result["outcome"] != "ok":
        return name + textwrap.shorten(result["outcome"], WIDTH - len(name), placeholder="...")
    parts = [f"{result['seconds']:>5.0f} s", f"{result['rows_per_second']:>8.2f} rows/s"]
    if result.get("loss_difference") is not None:
        parts.append(f"loss off by {result['loss_difference']:.0e}")
    if "resumed" in result:
        resumed = result["resumed"]
        parts.append("resumed" if resumed["outcome"] == "ok" else f"resume {resumed['outcome'].partition(':')[0]}")
    return name + "  ".join(parts)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format a row for each run, then what was refused or failed; differences are from the mode's first run."""
    rows, notes = [], []
    for result in results:
        row = {**result, "outcome": _word(result["outcome"])}
        outcomes = {"": result["outcome"]}
        if "resumed" in result:
            outcomes[", resumed"] = result["resumed"]["outcome"]
            row["resumed"] = _word(outcomes[", resumed"]) or _distance(result["resumed"])
        rows.append(row)
        notes += [f"- {result['run']}{part}: {text}" for part, text in outcomes.items() if text != "ok"]
    return "\n".join([format_table(rows, COLUMNS), *([""] if notes else []), *notes])


def _word(outcome: str) -> str:
    return "" if outcome == "ok" else outcome.partition(":")[0]


def _distance(resumed: Mapping[str, Any]) -> str:
    """Describe how far a resumed run ended from the uninterrupted one."""
    found = [resumed[name] for name in ("loss_difference", "grad_norm_difference", "weights_difference")]
    if None in found:
        return "other steps or tensors"
    return "identical" if not any(found) else f"loss {found[0]:.0e}, weights {found[2]:.0e}"


def write_results(folder: Path, results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write results.json, results.md and loss.png."""
    text = json.dumps({**facts, "results": list(results)}, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(results) + "\n", encoding="utf-8")
    done = [result for result in results if result["outcome"] == "ok"]
    if done:
        plot_losses(done, folder / "loss.png")


def plot_losses(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the losses of all runs, and below them their distance from the first run's; a column for each mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(result["mode"] for result in results))
    figure = Figure(figsize=(max(8, 5.5 * len(modes)), 7), layout="constrained")
    panels = figure.subplots(2, len(modes), squeeze=False, sharex="col", height_ratios=(3, 2))
    for column, mode in enumerate(modes):
        upper, lower = panels[0][column], panels[1][column]
        _draw([result for result in results if result["mode"] == mode], upper, lower)
        upper.set_title(mode)
    panels[0][0].set_ylabel("loss per learned token (nats)")
    panels[1][0].set_ylabel("difference from the first run")
    FigureCanvasAgg(figure).print_png(str(path))


def _draw(results: Sequence[Mapping[str, Any]], upper: Any, lower: Any) -> None:
    first = results[0]["losses"]
    for number, result in enumerate(results):
        share = number / max(1, len(results) - 1)
        style = {
            "color": f"C{number % 10}",
            "linestyle": DASHES[number % len(DASHES)],
            "linewidth": WIDEST + (NARROWEST - WIDEST) * share,
            "label": f"{result['strategy']} x{result['processes']}",
        }
        steps = range(1, len(result["losses"]) + 1)
        upper.plot(steps, result["losses"], **style)
        if number:
            apart = [max(SMALLEST, abs(a - b)) for a, b in zip(result["losses"], first, strict=False)]
            lower.plot(range(1, len(apart) + 1), apart, **style)
    upper.legend()
    upper.grid(alpha=0.3)
    lower.set_yscale("log")
    lower.set_ylim(bottom=SMALLEST)
    lower.set_xlabel("optimizer step")
    lower.grid(alpha=0.3)
