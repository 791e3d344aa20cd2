"""Export the page as a folder that is a Hugging Face Space, ready to be pushed (`--export_space`)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import qwen_vl_sft
from qwen_vl_sft import tiny
from qwen_vl_sft.checkpointing import run_folder
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.demo import examples as example_files
from qwen_vl_sft.demo.naming import EVALUATION, headline_score, label, model_name, run_names
from qwen_vl_sft.demo.options import DemoOptions
from qwen_vl_sft.demo.serve import prepare_gradio, read_sources
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE
from qwen_vl_sft.inference.source import Source
from qwen_vl_sft.merging.folder import PROCESSOR_FILES
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_CONFIG, ADAPTER_FILE
from qwen_vl_sft.modeling.base_model import build_on_meta, count_parameters

BUILTIN_MODEL = "builtin:tiny-qwen2-vl"
# Memory of the Hub's machines in GB, the cheapest first (T4s have no bfloat16); ROOM is the weights' share of it.
HARDWARE = {"l4x1": 24, "l40sx1": 48, "a100-large": 80}
ROOM = 0.75

APP = '''"""The page of base and tuned answers. Written by scripts/demo.py --export_space; the code is in qwen_vl_sft/."""

import os
from pathlib import Path

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.demo.examples import load_examples
from qwen_vl_sft.demo.options import DemoOptions
from qwen_vl_sft.demo.serve import serve

HERE = Path(__file__).parent
RUNS = {runs}
# A Space says where to listen.
LISTEN = ["--server_name", os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")]
if "GRADIO_SERVER_PORT" in os.environ:
    LISTEN += ["--server_port", os.environ["GRADIO_SERVER_PORT"]]

if __name__ == "__main__":
    quiet_libraries(rank=0)
    words = ["--run", *(str(HERE / run) for run in RUNS)]
    words += ["--max_file_size", "{max_file_size}", "--queue", "{queue}", *LISTEN]
    serve(parse(DemoOptions, words), load_examples(HERE / "examples"))
'''

CARD = """# {title}

Images and a question, answered by the base model ({base}) and by adapters on it, side by side:

{runs}

Try it on a machine of your own: `pip install gradio=={gradio} -r requirements.txt`, then `python app.py`. As a Space it
starts as it is: push this folder to a Space repository.
"""


def export_space(options: DemoOptions) -> None:
    """Write the Space. Raises `UserError`; then nothing is left in the folder."""
    folder = options.export_space
    assert folder is not None
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--export_space: {folder} exists already; name a new or an empty folder")
    prepare_gradio()
    sources = read_sources(options)
    raise_all(_problems(sources))
    from qwen_vl_sft.inference.source import check_one_base

    check_one_base(sources)
    names = [name.replace("/", "-") for name in run_names(sources)]
    with _staged(folder) as where:
        for name, source in zip(names, sources, strict=True):
            write_run(source, where / "runs" / name)
        images = where / "examples"
        images.mkdir()
        example_files.save_examples(example_files.collect_examples(sources[0], options.examples, images), images)
        copy_package(where / "qwen_vl_sft", with_model=model_name(sources[0].recipe.model) == BUILTIN_MODEL)
        runs = json.dumps([f"runs/{name}" for name in names])
        settings = {name: getattr(options, name) for name in ("max_file_size", "queue")}
        (where / "app.py").write_text(APP.format(runs=runs, **settings), encoding="utf-8")
        (where / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), encoding="utf-8")
        (where / "README.md").write_text(card(names, sources), encoding="utf-8")


def card(names: Sequence[str], sources: Sequence[Source]) -> str:
    """Format README.md: the front matter that configures a Space, and its text."""
    base, version = model_name(sources[0].recipe.model), metadata.version("gradio")
    front: dict[str, Any] = {
        "title": "Base and tuned, side by side",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": version,
        "python_version": "{}.{}".format(*sys.version_info),
        "app_file": "app.py",
        "pinned": False,
        "short_description": "Base and fine-tuned Qwen-VL on your image",
        "suggested_hardware": hardware(sources[0].recipe.model),
    }
    if base not in tiny.BUILTIN:
        front["models"] = [base]
    lines = []
    for name, source in zip(names, sources, strict=True):
        assert source.tuned
        lines.append(f"- {label(name, source.tuned)}")
    text = CARD.format(title=front["title"], base=base, runs="\n".join(lines), gradio=version)
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{text}"


def hardware(settings: ModelSettings) -> str:
    """Return the cheapest of the Hub's machines that holds the base model in its precision."""
    weights = sum(count.total for count in count_parameters(build_on_meta(settings)).values())
    size = weights * (
        0.6
        if settings.load_in_4bit
        else 1.1
        if settings.load_in_8bit or settings.load_in_fp8
        else 4
        if settings.dtype == "float32"
        else 2
    )
    if size < 100e6:
        return "cpu-basic"
    fitting = [name for name, memory in HARDWARE.items() if size < ROOM * memory * 1e9]
    return fitting[0] if fitting else list(HARDWARE)[-1]


def write_run(source: Source, folder: Path) -> None:
    """Write what the page needs of a run, without local paths: adapter, processor, system message, recipe."""
    tuned, name = source.tuned, model_name(source.recipe.model)
    assert tuned
    folder.mkdir(parents=True)
    shutil.copyfile(tuned.folder / ADAPTER_FILE, folder / ADAPTER_FILE)
    config = json.loads((tuned.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": name})
    for file in PROCESSOR_FILES:
        found = next(
            (source_folder / file for source_folder in (tuned.folder, tuned.home) if (source_folder / file).is_file()),
            None,
        )
        if found:
            shutil.copyfile(found, folder / file)
    (folder / run_folder.SYSTEM_MESSAGE).write_text(source.system_message or "", encoding="utf-8")
    # Of the data only what the page asks with: a data set's name may be a folder of this machine.
    data = {key: getattr(source.recipe.data, key) for key in ("dataset_format", "min_pixels", "max_pixels")}
    settings_of_page = data | {"max_new_tokens": source.recipe.run.max_new_tokens}
    recipe = asdict(source.recipe.model) | {"model_name_or_path": name} | settings_of_page
    (folder / run_folder.RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    score = headline_score(tuned)
    if score is not None:
        (folder / EVALUATION).mkdir()
        cells = {score[0]: {"mean": score[1]}}
        _write_json(folder / EVALUATION / SUMMARY_FILE, {"scores": {"tuned": {"all": cells}}})


def copy_package(folder: Path, with_model: bool) -> None:
    """Copy this package's code, since no index has it, and the tiny model only where it is the base."""
    home = Path(qwen_vl_sft.__file__).parent
    shutil.copytree(home, folder, ignore=shutil.ignore_patterns("__pycache__", "assets", "*.pyc"))
    if with_model:
        shutil.copytree(tiny.MODEL_DIR, folder / tiny.MODEL_DIR.relative_to(home))


def requirements() -> list[str]:
    """List the package's dependencies in their installed versions; Gradio's version is in the front matter."""
    try:
        needed = metadata.requires("qwen_vl_sft") or []
    except metadata.PackageNotFoundError:
        raise UserError(
            "--export_space needs the package to be installed (pip install .), to know its versions"
        ) from None
    names = [
        line.split(";")[0].split(">")[0].split("=")[0].split("<")[0].strip()
        for line in needed
        if "extra ==" not in line
    ]
    # What follows + names a build for one machine (torch 2.11.0+cu128).
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]


def _problems(sources: Sequence[Source]) -> list[str]:
    problems = []
    for source in sources:
        assert source.tuned
        name = str(source.recipe.model.model_name_or_path)
        if not source.tuned.is_adapter:
            problems.append(
                f"--export_space: {source.tuned.folder} holds a full model, and a Space takes adapters on a model of the"
                f" Hub; serve it from a machine of yours with scripts/demo.py"
            )
        elif Path(name).exists() and model_name(source.recipe.model) not in tiny.BUILTIN:
            problems.append(
                f"--export_space: the base model of {source.tuned.folder} is the folder {name}, which a Space does not have;"
                f" give its Hub id with --model_name_or_path"
            )
    return problems


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end, or is deleted on any failure."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        where = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"--export_space: {folder} cannot be written: {error.strerror}; name another folder") from None
    try:
        yield where
        umask = os.umask(0)
        os.umask(umask)
        where.chmod(0o777 & ~umask)
        os.replace(where, folder)
    except OSError as error:
        raise UserError(f"--export_space: {folder} cannot be written: {error}; nothing was left there") from error
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
