"""Folders of the package import one way, in the order of the README's tree, which names all of them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from fixtures.repository import REPOSITORY

PACKAGE = REPOSITORY / "src/qwen_vl_sft"
ROOT = "(root)"


def imported_names(path: Path, package: str) -> Iterator[list[str]]:
    """What a module imports of its package, split at the dots: also inside functions, and for its types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: name the whole module, from {package} on"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1:] for name in names if name.split(".")[0] == package)


def folder_imports(package: Path) -> dict[str, dict[str, set[str]]]:
    """For each folder the others that it imports from, and which of its modules do. Modules of the root are one."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        folder = place.parts[0] if len(place.parts) > 1 else ROOT
        others = found.setdefault(folder, defaultdict(set))
        for name in imported_names(path, package.name):
            other = name[0] if name and (package / name[0]).is_dir() else ROOT
            if other != folder:
                others[other].add(str(place))
    return found


def module_imports(package: Path) -> dict[str, dict[str, set[str]]]:
    """For each module the others of the package that it imports, with the lines of code that do."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).with_suffix("")
        modules["/".join(place.parts).removesuffix("/__init__")] = path
    found: dict[str, dict[str, set[str]]] = {}
    for module, path in modules.items():
        others = found.setdefault(module, defaultdict(set))
        for name in imported_names(path, package.name):
            # A name of a module, or a module of a folder.
            for length in range(len(name), 0, -1):
                other = "/".join(name[:length])
                if other in modules:
                    if other != module:
                        others[other].add(path.name)
                    break
    return found


def check_no_cycle(imports: dict[str, dict[str, set[str]]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        # Each folder of the cycle is imported by the next one.
        cycle = error.args[1]
        edges = [f"{b} from {a} in {sorted(imports[b][a])}" for a, b in pairwise(cycle)]
        raise AssertionError("imports in a circle: " + "; ".join(edges)) from None


def test_folders_import_one_way():
    check_no_cycle(folder_imports(PACKAGE))


def test_modules_import_one_way():
    check_no_cycle(module_imports(PACKAGE))


def test_a_cycle_of_two_modules_of_a_folder_is_found(tmp_path):
    folder = tmp_path / "package/folder"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text("from package.folder.two import two")
    (folder / "two.py").write_text("two = 2")
    imports = module_imports(tmp_path / "package")
    assert imports == {"folder": {}, "folder/one": {"folder/two": {"one.py"}}, "folder/two": {}}
    check_no_cycle(imports)
    (folder / "two.py").write_text("if TYPE_CHECKING:\n    from package.folder import one")
    with pytest.raises(AssertionError, match=r"folder/two from folder/one in \['two.py'\]"):
        check_no_cycle(module_imports(tmp_path / "package"))


def test_a_cycle_is_found_wherever_it_imports(tmp_path):
    package = tmp_path / "package"
    modules = {
        "errors.py": "",
        "low/one.py": "from package.errors import UserError",
        "high/two.py": "from package.low import one\nfrom package.high import three",
    }
    for name, text in modules.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    imports = folder_imports(package)
    assert imports == {"high": {"low": {"high/two.py"}}, "low": {ROOT: {"low/one.py"}}, ROOT: {}}
    check_no_cycle(imports)
    (package / "low/late.py").write_text("def late():\n    import package.high.two")
    with pytest.raises(AssertionError, match=r"low from high in \['low/late.py'\]"):
        check_no_cycle(folder_imports(package))


def test_the_readme_lists_the_folders_in_the_order_of_imports():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("    src/qwen_vl_sft/")[1].split("\n\n")[0]
    order = [ROOT, *re.findall(r"^      (\w+)/ +\S", tree, re.MULTILINE)]
    imports = folder_imports(PACKAGE)
    assert sorted(order) == sorted(imports)
    wrong = {
        f"{folder} from {other}": sorted(modules)
        for folder, others in imports.items()
        for other, modules in others.items()
        if order.index(other) > order.index(folder)
    }
    assert not wrong, "imports that point down the README's list"


def test_the_readme_names_the_modules_of_the_root():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("    src/qwen_vl_sft/")[1].split("\n\n")[0]
    named = re.findall(r"\w+", tree.splitlines()[1].strip().split("  ")[0])
    assert sorted(named) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_the_readme_names_modules_where_they_are():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("    src/qwen_vl_sft/")[1].split("\n\n")[0]
    named = re.findall(r"^      (\w+)/ +(.+)$", tree, re.MULTILINE)
    modules = [PACKAGE / folder / name for folder, line in named for name in re.findall(r"(?:\w+/)*\w+\.py|\w+/", line)]
    assert not [str(path) for path in modules if not path.exists()]


def module_path(name: list[str]) -> Path | None:
    """Return the file of `name` of the package, or of the module or package that the last part is taken from."""
    for parts in (name, name[:-1]):
        for path in (PACKAGE.joinpath(*parts).with_suffix(".py"), PACKAGE.joinpath(*parts) / "__init__.py"):
            if parts and path.is_file():
                return path
    return None


def imported_by(folder: str) -> tuple[set[Path], set[str]]:
    """Return the modules of the package that a folder imports, directly or not, and the other packages these import."""
    found: set[Path] = set()
    others: set[str] = set()
    left = list((PACKAGE / folder).glob("*.py"))
    while left:
        path = left.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                others |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                others.add(str(node.module).split(".")[0])
        paths = (module_path(name) for name in imported_names(path, PACKAGE.name))
        left += [path for path in paths if path is not None and path not in found]
    return found, others


def test_settings_need_neither_torch_nor_evaluation_nor_the_hub():
    """Nor the library whose fields are keys of a recipe: reading one needs nothing of what a run does later."""
    modules, others = imported_by("config")
    folders = {path.relative_to(PACKAGE).parts[0] for path in modules if path.parent != PACKAGE}
    assert folders == {"config", "tiny"}
    assert not others & {"torch", "transformers", "trl", "huggingface_hub", "peft"}


def test_no_two_test_files_have_one_name():
    """pytest imports them by name: of two alike, one is not run."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
