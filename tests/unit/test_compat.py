"""Changes to libraries: each is still needed, what it relies on is still there, and it is listed."""

import re
import sys
import tomllib
from importlib import metadata

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fixtures.models import FAMILIES, newer, qwen2_vl
from fixtures.processes import run_process
from fixtures.repository import REPOSITORY
from qwen_vl_sft.compat import registry
from qwen_vl_sft.compat.catalogue import all_patches, patches_page
from qwen_vl_sft.compat.registry import Patch, broken_reliance, look_up, missing_requirement
from qwen_vl_sft.compat.tested_versions import TESTED, untested_versions
from qwen_vl_sft.training.trainer import VisionSFTTrainer

PATCHES = {patch.name: patch for patch in all_patches()}
CHECKED_HERE = {name: patch for name, patch in PATCHES.items() if missing_requirement(patch) is None}
# On a CPU, with what `make setup` installs.
CHECKED_ELSEWHERE = {
    "gather_bytes",
    "end_workers",
    "use_fused_kernels",
    "keep_compiled_kernels",
    "unpack_rows_by_blocks",
}
LIBRARIES = ("transformers", "trl", "accelerate")
RANGES = [
    Requirement(line) for line in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
]
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OPTIONAL = [Requirement(line) for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
SFT = [sys.executable, str(REPOSITORY / "scripts/sft.py"), "--recipe", "nowhere.yaml"]


@pytest.mark.parametrize("name", [name for name, patch in CHECKED_HERE.items() if patch.still_needed])
def test_the_library_still_needs_the_change(name):
    patch = PATCHES[name]
    assert patch.still_needed(), f"{patch.package} no longer needs {name}: remove {patch.applied_by} and its entry"


def test_what_cannot_be_checked_here_is_known():
    assert set(PATCHES) - set(CHECKED_HERE) <= CHECKED_ELSEWHERE


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_rely_on_is_still_there(family):
    model = qwen2_vl() if family == "qwen2_vl" else newer(family)
    problems = {name: broken_reliance(patch, model) for name, patch in CHECKED_HERE.items()}
    assert not {name: found for name, found in problems.items() if found}


def test_parts_of_models_that_changes_rely_on_exist_in_some_family():
    models = [qwen2_vl(), *(newer(family) for family in FAMILIES[1:])]
    named = {path for patch in PATCHES.values() for path in (*patch.relies_on, *patch.reads)}
    paths = {path for path in named if path.startswith("model.")}
    assert paths
    assert not {path for path in paths if not any(registry._look_up(path, model) for model in models)}


def test_a_mended_library_is_noticed(monkeypatch):
    def training_step(trainer, model, inputs, num_items_in_batch=None):
        """Set nothing."""

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    assert not PATCHES["already_training"].still_needed()
    monkeypatch.setattr(transformers.trainer_callback.CallbackHandler, "call_event", lambda *args, **kwargs: None)
    assert not PATCHES["guard_loggers"].still_needed()


def test_what_is_gone_is_noticed(monkeypatch):
    def _save(trainer, folder):
        """Take other words."""

    monkeypatch.setattr(transformers.Trainer, "_save", _save)
    path = "transformers.trainer.Trainer"
    assert broken_reliance(PATCHES["_save"], None) == [
        f"{path}._save no longer takes {name}" for name in ("output_dir", "state_dict")
    ]
    monkeypatch.delattr(transformers.Trainer, "_save")
    assert broken_reliance(PATCHES["_save"], None) == [f"{path}._save is gone"]
    reading = Patch("", "", "", "", "", reads={f"{path}.train": ("resume_from_checkpoint", "no such word")})
    assert broken_reliance(reading, None) == [f"{path}.train no longer reads no such word"]


def test_every_overridden_private_method_has_an_entry():
    """Of all classes of ours that make up the trainer, those methods that a library's class has too."""
    ours = [cls for cls in VisionSFTTrainer.__mro__ if cls.__module__.startswith("qwen_vl_sft")]
    theirs = [cls for cls in VisionSFTTrainer.__mro__ if cls.__module__.startswith(LIBRARIES)]
    overridden = {
        name
        for cls in ours
        for name, value in vars(cls).items()
        if callable(value) and re.match(r"_[a-z]", name) and any(name in vars(library) for library in theirs)
    }
    assert overridden == {name for name, patch in PATCHES.items() if patch.kind == "override"}


def test_entries_are_complete():
    assert len(PATCHES) == len(all_patches())
    for name, patch in PATCHES.items():
        assert look_up(f"qwen_vl_sft.{patch.applied_by}"), name
        assert patch.still_needed or patch.relies_on or patch.reads or patch.needs, name
        assert patch.still_needed or patch.kind != "workaround", name
        assert all(link.startswith("https://github.com/") for link in patch.links), name
        assert patch.without.endswith("."), name


@pytest.mark.parametrize("name", [name for name, patch in PATCHES.items() if patch.package in TESTED and patch.broken])
def test_the_newest_tested_versions_have_the_fault(name):
    patch = PATCHES[name]
    first, _ = TESTED[patch.package]
    assert SpecifierSet(patch.broken, prereleases=True).contains(first)


def test_the_page_is_current():
    made = "python -m qwen_vl_sft.compat > docs/patches.md"
    assert (REPOSITORY / "docs/patches.md").read_text(encoding="utf-8") == patches_page(), f"run {made}"


def versions(**changed):
    def installed(package):
        if package == "deepspeed":
            raise metadata.PackageNotFoundError
        return changed.get(package, f"{TESTED[package][0]}")

    return installed


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        (
            "transformers",
            "5.30.1",
            ["transformers 5.30.1 is newer than the tested 5.23;", "pip install 'transformers>=5.23,<5.24'"],
        ),
        ("trl", "1.17.0.dev0", ["trl 1.17.0.dev0 is newer"]),
        ("torch", "2.10.0+cu128", ["torch 2.10.0+cu128 is older than the tested 2.11;"]),
    ],
)
def test_versions_outside_the_tested_ones_are_told(package, version, words):
    (warning,) = untested_versions(versions(**{package: version}))
    assert all(word in warning for word in words)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.11.1", "2.11.1.post1"])
def test_tested_versions_are_not_told(version):
    assert list(untested_versions(versions(torch=version))) == []
    assert list(untested_versions()) == []


def test_a_run_tells_of_untested_versions_once(tmp_path):
    """`scripts/sft.py` on its first process, before it reads the recipe."""
    information = tmp_path / "trl-9.9.dist-info/METADATA"
    information.parent.mkdir()
    information.write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.9\n")
    told = []
    for rank in ("0", "1"):
        env = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'src'}", "RANK": rank}
        ended = run_process("scripts/sft.py", "--recipe", "nowhere.yaml", env=env)
        assert ended.returncode == 2
        told.append(ended.stderr.count("warning: trl 9.9 is newer than the tested 1.16"))
    assert told == [1, 0]


def test_dependencies_have_bounds_that_the_tests_run_with():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for requirement in [*RANGES, *OPTIONAL]:
        name = requirement.name.lower().replace("_", "-")
        assert any(bound.operator == "<" for bound in requirement.specifier), f"{name} has no upper bound"
        if name in pinned:
            assert requirement.specifier.contains(pinned[name], prereleases=True), f"{name}=={pinned[name]}"
        if name in TESTED:
            first, end = TESTED[name]
            assert requirement.specifier == SpecifierSet(f">={first},<{end}"), name
    assert set(TESTED) <= {requirement.name for requirement in [*RANGES, *OPTIONAL]}
