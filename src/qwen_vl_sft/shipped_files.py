"""Files that the package ships besides its code: recipes, launch configurations, Slurm jobs and scripts.

They lie at the top of the repository; a wheel installs them into `share/qwen_vl_sft` (pyproject.toml, data-files).
"""

from __future__ import annotations

from pathlib import Path

from qwen_vl_sft.errors import UserError

RECIPES, LAUNCH_CONFIGS, SCRIPTS, SLURM = "recipes", "accelerate_configs", "scripts", "slurm"
FOLDERS = (RECIPES, LAUNCH_CONFIGS, SLURM, SCRIPTS)

_PACKAGE = Path(__file__).resolve().parent
# pip puts data files beside site-packages (--target) or at most four folders above the package: in a virtual
# environment, for --user and for --prefix.
_MOST_FOLDERS_UP = 5


def shipped_root(package: Path = _PACKAGE) -> Path | None:
    """Return the folder that holds `FOLDERS`, or None where the code was copied without them.

    `package` is the folder of this package: in a checkout, or installed.
    """
    installed = [folder / "share" / package.name for folder in package.parents[:_MOST_FOLDERS_UP]]
    for root in (package.parents[1], *installed):
        if (root / SCRIPTS / "sft.py").is_file() and (root / RECIPES).is_dir():
            return root
    return None


def find_file(path: str | Path, folder: str) -> Path | None:
    """Return the file at `path` if there is one, else the shipped file that it names, else None.

    A shipped file of `folder` is named by its path (`recipes/x.yaml`), its name (`x.yaml`), or without `.yaml`.
    """
    path = Path(path)
    if path.is_file():
        return path
    root = shipped_root()
    if root is None or path.parts not in {(path.name,), (folder, path.name)}:
        return None
    candidates = (root / folder / name for name in (path.name, f"{path.name}.yaml"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def shipped_names(folder: str) -> list[str]:
    """Return the shipped files of a folder as one names them from anywhere, such as `recipes/quickstart.yaml`."""
    root = shipped_root()
    return [] if root is None else [f"{folder}/{path.name}" for path in sorted((root / folder).glob("*.*"))]


def require_root() -> Path:
    """Return `shipped_root()`. Raises `UserError` where there is none."""
    root = shipped_root()
    if root is None:
        raise UserError(
            f"the files that come with qwen_vl_sft ({', '.join(FOLDERS)}) are not next to its code in {_PACKAGE}; install "
            "the package with pip, or run it from a checkout of the repository"
        )
    return root


def script(name: str) -> Path:
    """Return the path of a shipped script, such as `sft`. Raises `UserError` where there is none."""
    path = require_root() / SCRIPTS / f"{name}.py"
    if not path.is_file():
        raise UserError(f"there is no script {name}; there are {', '.join(shipped_names(SCRIPTS))}")
    return path


def launch_config(name: str, option: str = "accelerate_config") -> Path:
    """Return an accelerate configuration by its path or shipped name, such as `ddp`.

    Raises `UserError`, which names the `option` that gave the name.
    """
    found = find_file(name, LAUNCH_CONFIGS)
    if found is None:
        shipped = [Path(path).stem for path in shipped_names(LAUNCH_CONFIGS) if path.endswith(".yaml")]
        raise UserError(f"{option}: {name} does not exist; name a file, or one of {', '.join(shipped)}")
    return found


def copy_files(target: Path, folders: tuple[str, ...] | list[str] = FOLDERS) -> list[Path]:
    """Copy shipped folders into `target`, which then works like the repository's top folder; return the new files.

    Files that are there with the same content are left alone. Raises `UserError`, having written nothing, for a folder
    that does not ship and for a file that is there with other content.
    """
    unknown = [folder for folder in folders if folder not in FOLDERS]
    if unknown:
        raise UserError(f"copy: {', '.join(unknown)} does not ship; there are {', '.join(FOLDERS)}")
    root = require_root()
    copies = {
        target / folder / path.name: path.read_bytes() for folder in folders for path in (root / folder).glob("*.*")
    }
    changed = [str(path) for path, content in copies.items() if path.exists() and path.read_bytes() != content]
    if changed:
        raise UserError(f"copy: {', '.join(sorted(changed))} would be overwritten; move it away, or copy elsewhere")
    new = sorted(path for path in copies if not path.exists())
    for path in new:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(copies[path])
    return new
