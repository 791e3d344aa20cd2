"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def plot_loss(log_history: list[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss over optimizer steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def plot_expert_load(load: torch.Tensor, log_history: list[dict[str, Any]], path: Path) -> None:
    """Load of each expert of each layer [layers, E], where an even load is 1, and its extremes over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
    shares = load.double() / load.double().mean(1, keepdim=True).clamp(min=1e-9)
    image = upper.imshow(shares.numpy(), aspect="auto", interpolation="nearest", vmin=0)
    upper.set_xlabel("expert")
    upper.set_ylabel("layer with experts")
    figure.colorbar(image, ax=upper, label="tokens, as a multiple of an even load")
    for key, label in (("expert_load_max", "busiest expert of any layer"), ("expert_load_min", "least used expert")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            lower.plot(*zip(*points, strict=True), label=label)
    lower.set_xlabel("optimizer step")
    lower.set_ylabel("multiple of an even load")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.3)
    if lower.lines:
        lower.legend()
    FigureCanvasAgg(figure).print_png(str(path))
