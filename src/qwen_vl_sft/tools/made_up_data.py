"""Data sets of any size for measuring: noise for images, and conversations of a few turns about them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from PIL import ImageDraw

_WORDS = (
    "what",
    "which",
    "value",
    "bar",
    "line",
    "color",
    "chart",
    "shows",
    "the",
    "largest",
    "year",
    "label",
    "and",
    "of",
)


def picture(width: int, height: int, seed: int, kind: str = "JPEG", cell: int = 40) -> bytes:
    """Draw an encoded image of blurred noise, which takes about as long to decode as a photo."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // cell, width // cell, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(noise).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


def chart(width: int, height: int, seed: int) -> bytes:
    """Draw a bar chart as an encoded PNG: flat colors, lines and some text."""
    draw = random.Random(seed)
    image = PillowImage.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for number in range(12):
        left, top = 60 + number * (width - 80) // 12, draw.randrange(60, height - 80)
        color = tuple(draw.randrange(256) for _ in range(3))
        pen.rectangle((left, top, left + width // 20, height - 50), fill=color)
        pen.line((50, 40 + number * height // 14, width - 20, 40 + number * height // 14), fill="lightgrey")
        pen.text((left, height - 40), f"{draw.choice(_WORDS)} {draw.random():.2f}", fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def conversation(turns: int, seed: int) -> list[dict[str, str]]:
    """Make up a conversation about an image, of so many questions with their answers."""
    draw = random.Random(seed)
    found = []
    for number in range(turns):
        question, answer = (" ".join(draw.choices(_WORDS, k=words)) for words in (12, 20))
        found.append({"from": "human", "value": f"{'<image>' if not number else ''}{question}?"})
        found.append({"from": "gpt", "value": f"{answer}."})
    return found


def write_conversations(folder: Path, rows: int, images: int, size: tuple[int, int] = (640, 480)) -> Path:
    """Write JSON lines of conversations of 1 to 9 turns, over image files that several of them show, as LLaVA's data are."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        file = folder / "images" / f"{number}.jpg"
        if not file.exists():
            file.write_bytes(picture(*size, seed=number))
    with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(rows):
            row: dict[str, Any] = {"id": str(number), "image": f"images/{number % images}.jpg"}
            lines.write(json.dumps({**row, "conversations": conversation(1 + number % 9, number)}) + "\n")
    return folder


def write_charts(folder: Path, rows: int) -> Path:
    """Write a Parquet file of small images with a question and an answer each, as ChartQA's data are."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "query": Value("string"), "label": Value("string")})
    pictures = [picture(56, 56, seed, "PNG", cell=7) for seed in range(100)]
    charts = [
        {"image": {"bytes": pictures[number % 100], "path": None}, "query": f"Which is {number}?", "label": str(number)}
        for number in range(rows)
    ]
    Dataset.from_list(charts, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder
