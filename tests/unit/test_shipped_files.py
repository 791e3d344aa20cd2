"""Recipes and launch files: found by path and by name, from a checkout and from every place that pip installs into."""

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft import shipped_files
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DEEPSPEED_FILE, DistributedContext, deepspeed_file
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.shipped_files import FOLDERS, copy_files, find_file, launch_config, script, shipped_names, shipped_root


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, which the tests run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("package", "root"),
    [
        ("repository/src/qwen_vl_sft", "repository"),
        ("venv/lib/python3.11/site-packages/qwen_vl_sft", "venv/share/qwen_vl_sft"),
        ("home/.local/lib/python3.11/site-packages/qwen_vl_sft", "home/.local/share/qwen_vl_sft"),
        ("usr/local/lib/python3.11/dist-packages/qwen_vl_sft", "usr/local/share/qwen_vl_sft"),
        ("target/qwen_vl_sft", "target/share/qwen_vl_sft"),
        ("space/app/qwen_vl_sft", None),
    ],
)
def test_the_files_are_found_where_git_and_pip_put_them(package, root, tmp_path):
    (tmp_path / package).mkdir(parents=True)
    if root is not None:
        for name in ("scripts/sft.py", "recipes/quickstart.yaml"):
            (tmp_path / root / name).parent.mkdir(parents=True)
            (tmp_path / root / name).touch()
    assert shipped_root(tmp_path / package) == (tmp_path / root if root else None)


@pytest.mark.parametrize("name", ["quickstart.yaml", "recipes/quickstart.yaml", "quickstart"])
def test_a_shipped_recipe_is_found_from_any_folder(name, elsewhere):
    assert find_file(name, "recipes") == REPOSITORY / "recipes/quickstart.yaml"
    assert read_recipe(name, {}).training["output_dir"] == "runs/quickstart"


def test_a_file_of_the_user_wins_over_the_shipped_one_of_its_name(elsewhere):
    (elsewhere / "quickstart.yaml").write_text("output_dir: mine\n")
    (elsewhere / "quickstart").mkdir()
    assert read_recipe("quickstart.yaml", {}).training["output_dir"] == "mine"
    assert read_recipe("quickstart", {}).training["output_dir"] == "runs/quickstart"


@pytest.mark.parametrize("name", ["recipe/quickstart.yaml", "accelerate_configs/quickstart.yaml", "quikstart.yaml"])
def test_a_mistyped_path_does_not_become_a_shipped_recipe(name, elsewhere):
    assert find_file(name, "recipes") is None
    with pytest.raises(UserError, match=rf"recipe {name} does not exist; here are .*recipes/quickstart\.yaml"):
        read_recipe(name, {})


@pytest.mark.parametrize("name", ["zero2", "zero2.yaml", "accelerate_configs/zero2.yaml"])
def test_a_launch_configuration_is_found_from_any_folder(name, elsewhere):
    assert launch_config(name) == REPOSITORY / "accelerate_configs/zero2.yaml"


def test_an_unknown_launch_configuration_names_the_shipped_ones(elsewhere):
    with pytest.raises(UserError, match=r"zero9 does not exist; name a file, or one of cpu, ddp, fsdp2, .*zero3$"):
        launch_config("zero9")


def test_the_deepspeed_file_of_a_shipped_configuration_is_found_from_any_folder(elsewhere, monkeypatch):
    shipped = REPOSITORY / "accelerate_configs/zero2.json"
    assert deepspeed_file("accelerate_configs/zero2.json") == shipped
    assert deepspeed_file("configs/zero2.json").parts == ("configs", "zero2.json")
    monkeypatch.setenv(DEEPSPEED_FILE, "accelerate_configs/zero2.json")
    launch.start(DistributedContext("zero2", processes=2, rank=0, local_rank=0, on_cpu=False))
    assert launch.os.environ[DEEPSPEED_FILE] == str(shipped)


def test_a_script_that_does_not_ship():
    assert script("sft") == REPOSITORY / "scripts/sft.py"
    with pytest.raises(UserError, match=r"there is no script sfft; there are .*scripts/sft\.py"):
        script("sfft")


def test_code_that_was_copied_alone_says_so(monkeypatch):
    monkeypatch.setattr(shipped_files, "shipped_root", lambda: None)
    assert (find_file("quickstart.yaml", "recipes"), shipped_names("recipes")) == (None, [])
    with pytest.raises(UserError, match="install the package with pip"):
        script("sft")


def test_copied_files_are_those_of_the_repository(tmp_path):
    new = copy_files(tmp_path)
    assert {path.relative_to(tmp_path).parts[0] for path in new} == set(FOLDERS)
    assert all(path.read_bytes() == (REPOSITORY / path.relative_to(tmp_path)).read_bytes() for path in new)
    assert copy_files(tmp_path) == []
    new[0].unlink()
    assert copy_files(tmp_path, ["accelerate_configs", "slurm"]) == new[:1]


def test_copying_overwrites_nothing(tmp_path):
    mine = tmp_path / "recipes/quickstart.yaml"
    mine.parent.mkdir()
    mine.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"recipes/quickstart\.yaml would be overwritten"):
        copy_files(tmp_path)
    with pytest.raises(UserError, match="recipe does not ship; there are recipes, accelerate_configs, slurm, scripts"):
        copy_files(tmp_path, ["recipe"])
    assert list(tmp_path.rglob("*.*")) == [mine]
