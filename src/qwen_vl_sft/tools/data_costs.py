"""Measuring what data cost: starts of a run by rows, a worker's work, long conversations, plans of large steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen_vl_sft import tiny
from qwen_vl_sft.distributed.ports import free_port
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.shipped_files import require_root
from qwen_vl_sft.tools.made_up_data import chart, conversation, picture, write_charts, write_conversations
from qwen_vl_sft.tools.measuring import TEXT, format_table, machine_facts, make_output_dir
from qwen_vl_sft.tools.options import DataCostsOptions

PARTS = ("starts", "large", "worker", "turns", "planning")
START_ROWS = (3_000, 30_000)
TURNS = (1, 5, 10, 20, 40)
# Rows, processes and tokens of a micro-batch of a planned step.
STEP = (4096, 128, 16_384)
_ROUNDS = 5
_COLUMNS = {
    "what": ("what", TEXT),
    "version": ("version", TEXT),
    "cpu_seconds": ("CPU s", "{:.1f}"),
    "seconds": ("s", "{:.1f}"),
    "milliseconds": ("ms", "{:.2f}"),
    "before": ("ms as transformers does it", "{:.2f}"),
    "peak_mib": ("peak MiB of a process", "{:,.0f}"),
}
Result = dict[str, Any]


def measure(options: DataCostsOptions) -> str:
    """Measure the parts that are asked for, write `data_costs.json`, and return the table. Raises `UserError`."""
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: {', '.join(unknown)} is unknown; choose from {', '.join(PARTS)}")
    # Versions run in folders of their own.
    options = replace(options, output_dir=options.output_dir.absolute())
    make_output_dir(options.output_dir)
    measured: dict[str, Callable[[DataCostsOptions], Iterator[Result]]] = {
        "starts": _starts,
        "large": _large,
        "worker": _worker,
        "turns": _turns,
        "planning": _planning,
    }
    results = []
    for part in options.parts:
        for result in measured[part](options):
            results.append(result)
            print(format_table([result], _COLUMNS).splitlines()[-1], flush=True)
    facts = json.dumps({**machine_facts(), "cores": os.cpu_count(), "results": results}, indent=2)
    (options.output_dir / "data_costs.json").write_text(facts + "\n", encoding="utf-8")
    return format_table(results, _COLUMNS)


def _starts(options: DataCostsOptions) -> Iterator[Result]:
    """First and second start of a dry run on rows of Parquet and of JSON lines, versions in turns."""
    versions = {"this": require_root(), **({"before": options.before.absolute()} if options.before else {})}
    for rows in START_ROWS:
        data = {
            "Parquet": write_charts(options.output_dir / f"charts-{rows}", rows),
            "JSON lines": write_conversations(options.output_dir / f"conversations-{rows}", rows, rows // 10, (56, 56)),
        }
        for kind, folder in data.items():
            for start in ("first", "second"):
                for version, checkout in versions.items():
                    cache = options.output_dir / f"cache-{version}-{folder.name}"
                    told = _run(
                        [_python(checkout), "scripts/sft.py", *_recipe(folder, cache), "--dry_run"], checkout, cache
                    )
                    yield {"what": f"{start} start, {rows:,} rows of {kind}", "version": version, **told}


def _large(options: DataCostsOptions) -> Iterator[Result]:
    """First and second start up to the first step, on several processes: rows of JSON lines over image files."""
    folder = write_conversations(options.output_dir / "large", options.rows, options.images)
    cache, checkout = options.output_dir / "cache-large", require_root()
    launcher = [_python(checkout), "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    launcher += ["--num_processes", str(options.processes), "--main_process_port", str(free_port()), "scripts/sft.py"]
    step = ["--max_steps", "1", "--save_strategy", "no", "--overwrite_output_dir", "true"]
    for start in ("first", "second"):
        told = _run([*launcher, *_recipe(folder, cache), *step], checkout, cache)
        what = f"{start} start and a step, {options.rows:,} rows of {options.images:,} images, {options.processes} processes"
        yield {"what": what, "version": "this", **told}


def _worker(options: DataCostsOptions) -> Iterator[Result]:
    """Return what a worker takes for an image, and what the image processor takes that is called as its own library does."""
    from qwen_vl_sft.data.media.image_file import ImageFile

    def all_of(work: Callable[[ImageFile], Any], images: list[bytes]) -> None:
        for image in images:
            work(ImageFile(image, None))

    charts = [chart(850, 600, seed) for seed in range(8)]
    photos = [picture(4000, 3000, seed, cell=10) for seed in range(2)]
    for what, images, limit in (
        ("chart of 850 x 600", charts, None),
        ("photo of 12 megapixels, brought to 1", photos, 2**20),
    ):
        encoder = _encoder(options, limit)

        def plain(file: ImageFile, processor: Any = encoder.processor) -> Any:
            return file.content_hash, processor.image_processor(images=[file.decode()], return_tensors="pt")

        # First as transformers does it: once this package has decoded a photo, the process keeps the memory for the next.
        (before,) = _fastest_in_turns([partial(all_of, plain, images)])
        (found,) = _fastest_in_turns([partial(all_of, encoder.read_media, images)])
        yield {
            "what": f"a worker's work on a {what}",
            "milliseconds": found / len(images),
            "before": before / len(images),
        }


def _turns(options: DataCostsOptions) -> Iterator[Result]:
    """Token ids and labels of conversations."""
    from qwen_vl_sft.data.chat_template import ChatTemplate
    from qwen_vl_sft.data.labels import tokenize_turns
    from qwen_vl_sft.families.base import ChatFormat

    template = ChatTemplate(_encoder(options, None).processor, ChatFormat())
    for count in TURNS:
        roles = {"human": "user", "gpt": "assistant"}
        messages: list[dict[str, Any]] = [
            {"role": roles[turn["from"]], "content": [{"type": "text", "text": turn["value"].removeprefix("<image>")}]}
            for turn in conversation(count, 0)
        ]
        (found,) = _fastest_in_turns([partial(tokenize_turns, template, messages, [])])
        yield {"what": f"token ids of a conversation of {count} turn(s)", "milliseconds": found}


def _planning(options: DataCostsOptions) -> Iterator[Result]:
    """Plan a step, with prefixes shared and not."""
    import numpy as np

    from qwen_vl_sft.batching.global_batch import GlobalBatch
    from qwen_vl_sft.batching.packing import StepPlan
    from qwen_vl_sft.data.row_lengths import RowLengths

    rows, processes, budget = STEP
    draw = np.random.default_rng(0)
    images = np.arange(rows) // 3
    prefix_tokens = draw.integers(150, 900, rows)[images]
    tokens = prefix_tokens + draw.integers(30, 300, rows)
    sizes = RowLengths(
        tokens, tokens, np.ones(rows, np.int64), 4 * prefix_tokens, images, prefix_tokens, 4 * prefix_tokens
    )
    for share, name in ((False, ""), (True, ", prefixes shared")):
        plan = StepPlan(sizes, GlobalBatch(rows=rows), budget, processes, 0, share)
        (found,) = _fastest_in_turns([partial(plan.split, range(rows))])
        yield {"what": f"plan of a step of {rows:,} rows, {processes} processes{name}", "milliseconds": found}


def _encoder(options: DataCostsOptions, max_pixels: int | None) -> Any:
    import torch
    from transformers import AutoProcessor

    from qwen_vl_sft.data.encoding import Encoder
    from qwen_vl_sft.modeling.base_model import set_pixel_limits

    # As in a worker of a data loader.
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(options.processor or str(tiny.MODEL_DIR))
    set_pixel_limits(processor, None, max_pixels)
    return Encoder(processor)


def _fastest_in_turns(ways: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the least CPU milliseconds of each way, measured in turns: other work on the machine only adds to them."""
    found = [float("inf")] * len(ways)
    for _ in range(_ROUNDS):
        for number, way in enumerate(ways):
            start = time.process_time()
            way()
            found[number] = min(found[number], (time.process_time() - start) * 1000)
    return found


def _python(checkout: Path) -> str:
    own = checkout / ".venv/bin/python"
    return str(own) if own.is_file() else sys.executable


def _recipe(data: Path, cache: Path) -> list[str]:
    """Return the words of a run of the embedded model, in keys that all versions know."""
    keys = {
        "model_name_or_path": tiny.MODEL_DIR,
        "load_in_4bit": "false",
        "dataset_name": data,
        "dataset_format": "auto",
        "eval_strategy": "no",
        "predict_with_generate": "false",
        "load_best_model_at_end": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "output_dir": cache.with_name(f"{cache.name}-run"),
    }
    words = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    return ["--recipe", "recipes/quickstart.yaml", *words]


def _run(command: list[str], checkout: Path, cache: Path) -> Result:
    """Run a command of a checkout with its own caches; returns its seconds, and the peak of its largest process."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout / "src"),
        "HF_DATASETS_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    with (cache.with_name(f"{cache.name}.log")).open("wb") as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{checkout}: the run has failed; its output is in {log.name}")
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }
