"""README and docs/: their length, and whether the files, links, commands and recipe keys that they name exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft.cli import split_launch_options
from qwen_vl_sft.config.command_line import option_names
from qwen_vl_sft.config.reading import key_hints
from qwen_vl_sft.config.settings_page import other_trainers_page, settings_page
from qwen_vl_sft.demo import options as demo
from qwen_vl_sft.diagnosis import options as diagnosis
from qwen_vl_sft.evaluation import options as evaluation
from qwen_vl_sft.exporting import options as exporting
from qwen_vl_sft.inference import options as inference
from qwen_vl_sft.merging import plan as merging
from qwen_vl_sft.planning import options as planning
from qwen_vl_sft.previewing import options as previewing
from qwen_vl_sft.publishing import options as publishing
from qwen_vl_sft.serving import options as serving
from qwen_vl_sft.tools import options as tools

PACKAGE = REPOSITORY / "src/qwen_vl_sft"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
MOST_LINES = 170
MOST_LINES_OF_A_PARAGRAPH = 5
FOLDERS = ("scripts", "recipes", "accelerate_configs", "slurm", "src", "tests", "docs", "benchmarks", "notebooks")
# Words of scripts/sft.py's command line that are no recipe keys.
SWITCHES = {"recipe", "dry_run", "help"}
OPTIONS = {
    "engine_environment": serving.EnvironmentOptions,
    "serve_check": serving.ServeCheckOptions,
    "evaluate": evaluation.EvaluateOptions,
    "export": exporting.ExportOptions,
    "generate": inference.GenerateOptions,
    "demo": demo.DemoOptions,
    "merge": merging.MergeOptions,
    "push": publishing.PushOptions,
    "benchmark": tools.BenchmarkOptions,
    "benchmark_answers": tools.AnswerBenchmarkOptions,
    "check_packing": tools.CheckPackingOptions,
    "compare_bases": tools.CompareBasesOptions,
    "compare_strategies": tools.CompareStrategiesOptions,
    "data_costs": tools.DataCostsOptions,
    "kill_and_resume": tools.KillAndResumeOptions,
    "make_random_model": tools.RandomModelOptions,
    "make_tiny": tools.TinyOptions,
    "doctor": diagnosis.DoctorOptions,
    "plan": planning.PlanOptions,
    "preview": previewing.PreviewOptions,
    "check_plan": planning.CheckPlanOptions,
}
MEASURING = (
    "benchmark",
    "benchmark_answers",
    "check_packing",
    "check_plan",
    "compare_bases",
    "compare_strategies",
    "kill_and_resume",
    "plan",
    "preview",
)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(text: str) -> str:
    """The page without its indented blocks of commands and output."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def commands(text: str) -> Iterator[str]:
    """The lines of a page's indented blocks, continued lines joined."""
    block = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    yield from re.sub(r"\\\n\s+", "", block).splitlines()


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@every_page
def test_paragraphs_are_short(page):
    # A point of a list is a paragraph of its own; tables and headings are none.
    text = re.sub(r"^(- |#)", r"\n\1", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text)]
    long = [part for part in paragraphs if not part.startswith("|") and part.count("\n") >= MOST_LINES_OF_A_PARAGRAPH]
    assert not long


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[\w.]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {str(page.relative_to(REPOSITORY)) for page in PAGES if page != README}


@every_page
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        if not path.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert not broken


@every_page
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    names = set(
        re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", " ".join([*commands(text), *inline_code(text)]))
    )
    # A module may be named from the package's folder.
    modules = {code for code in inline_code(text) if re.fullmatch(r"\w+/[\w/]+\.py", code)} - names
    missing = {name for name in names if not (REPOSITORY / name).exists()}
    assert not missing | {name for name in modules if not (PACKAGE / name).exists()}


@every_page
def test_keys_of_commands_exist(page):
    keys = set(key_hints()) | SWITCHES
    wrong = {}
    for command in commands(page.read_text(encoding="utf-8")):
        _, *after = re.split(r"scripts/sft\.py|qwen_vl_sft sft", command, maxsplit=1)
        if after:
            _, words = split_launch_options(shlex.split(after[0], comments=True))
            wrong[command] = [word for word in words if word.startswith("--") and word[2:] not in keys]
    assert not {command: words for command, words in wrong.items() if words}


@every_page
def test_options_of_commands_exist(page):
    wrong = {}
    for command in commands(page.read_text(encoding="utf-8")):
        found = re.search(r"(?:scripts/|qwen_vl_sft )(\w+)(?:\.py)? (.*)", command)
        if found and found[1] != "sft":
            _, words = split_launch_options(shlex.split(found[2], comments=True))
            kind = OPTIONS.get(found[1])
            known = set(option_names(kind)) if kind else set()
            # Scripts that measure pass other keys on to the recipe.
            known |= set(key_hints()) if found[1] in MEASURING else set()
            wrong[command] = {word[2:] for word in words if word.startswith("--")} - known
    assert not {command: names for command, names in wrong.items() if names}


@every_page
def test_named_recipe_keys_exist(page):
    text = page.read_text(encoding="utf-8")
    stated = {match[1] for code in inline_code(text) if (match := re.match(r"([a-z_]\w+): ", code))}
    for table in re.findall(r"^\| key \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in table.splitlines():
            stated |= {code.split(":")[0] for code in re.findall(r"`([^`]+)`", line.split(" | ")[0])}
    assert not stated - set(key_hints())


@every_page
def test_rows_shown_are_jsonl(page):
    for line in commands(page.read_text(encoding="utf-8")):
        if line.lstrip().startswith('{"'):
            row = json.loads(line)
            assert set(row) <= {"messages", "conversations", "images", "image", "objects"}


def test_the_readme_lists_every_script():
    tree = README.read_text(encoding="utf-8").split("    scripts/\n")[1].split("    src/")[0]
    assert sorted(re.findall(r"^      (\w+\.py)", tree, re.MULTILINE)) == sorted(
        path.name for path in (REPOSITORY / "scripts").glob("*.py")
    )


def test_the_page_of_settings_is_current():
    made = "python -m qwen_vl_sft.config.settings_page > docs/settings.md"
    assert (REPOSITORY / "docs/settings.md").read_text(encoding="utf-8") == settings_page(), f"run {made}"
    made = "python -m qwen_vl_sft.config.settings_page other_trainers > docs/other_trainers.md"
    assert (REPOSITORY / "docs/other_trainers.md").read_text(encoding="utf-8") == other_trainers_page(), f"run {made}"
