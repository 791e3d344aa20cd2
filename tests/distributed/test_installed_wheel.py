"""The package as `pip install` brings it: the wheel is built, installed, and used from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fixtures.ports import free_port
from fixtures.processes import PROCESS_TIMEOUT
from fixtures.repository import REPOSITORY

WITHOUT_PACKAGES = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command as outside the repository, with further `variables`; return its standard output."""
    return started(*words, cwd=cwd, **variables).stdout


def started(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", **variables}
    finished = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=PROCESS_TIMEOUT
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command of a new environment, which has the package from its wheel and all others from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools writes into the folder it builds, and takes up again what an earlier build left there.
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "recipes", "accelerate_configs", "slurm", "scripts"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", *WITHOUT_PACKAGES, "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(*pip, "--python", python, "install", *WITHOUT_PACKAGES, *folder.glob("*.whl"), cwd=folder)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    Path(packages, "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv/bin/qwen_vl_sft"


def test_all_files_are_there(command, tmp_path):
    listed = run(command, "files", cwd=tmp_path)
    assert listed.startswith(f"{command.parents[1]}/share/qwen_vl_sft\n")
    for name in ("recipes", "accelerate_configs", "slurm", "scripts"):
        assert set(listed.split()) >= {path.name for path in (REPOSITORY / name).glob("*.*")}


def test_a_shipped_recipe_from_an_empty_folder(command, tmp_path):
    words = ("sft", "--recipe", "quickstart.yaml", "--dry_run", "true")
    dry_run = started(command, *words, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    shown = dry_run.stdout
    assert "{{Yes<|im_end|>}}" in shown
    assert f"{command.parents[1]}/lib" in shown
    assert list(tmp_path.iterdir()) == []
    imported = {line.rpartition("|")[2].strip() for line in dry_run.stderr.splitlines()}
    assert {"torch", "datasets", "transformers.modeling_utils"} <= imported
    # Half of the seconds that a dry run takes, if something of the package imports one of them.
    trained_with = {
        "trl",
        "peft",
        "bitsandbytes",
        "transformers.trainer_utils",
        "torch._inductor.compile_fx",
        "matplotlib",
    }
    assert not imported & trained_with


@pytest.mark.long
def test_zero_from_an_empty_folder(command, tmp_path):
    """The launcher, the check of what it was asked for, and the JSON that the configuration names."""
    pytest.importorskip("deepspeed")
    launch = ("--accelerate_config", "zero2", "--num_processes", "2", "--main_process_port", str(free_port()))
    short = "--max_steps 2 --max_train_samples 32 --eval_strategy no --save_strategy no --load_best_model_at_end false"
    words = ("--recipe", "recipes/quickstart.yaml", "--output_dir", "run", *short.split())
    assert "strategy    zero2, 2 process(es) on CPU" in run(command, "sft", *launch, *words, cwd=tmp_path)
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
