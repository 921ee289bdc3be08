"""The working directory of a submitted job: this code, its config, and further files that it is given."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import prefarena
from prefarena.errors import UserError

CONFIG_NAME = "comparison.yaml"
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def write_package(folder: Path, pipelines: Path, config: str, include: Sequence[Path] = ()) -> None:
    """Fill an empty folder with the packages `pipelines` and `prefarena`, the config's text, and copies of `include`.

    Both packages are those that are imported here, from a checkout or installed: the job runs the code that submitted
    it, whatever its nodes have. They lie side by side, so the folder alone has to be on the job's path. Raises
    UserError for a path of `include` that is missing, or whose name the package needs itself.
    """
    library = Path(prefarena.__file__).parent
    for source in (pipelines, library):
        shutil.copytree(source, folder / source.name, ignore=_NOT_CODE)
    (folder / CONFIG_NAME).write_text(config, encoding="utf-8")
    for path in include:
        target = folder / path.resolve().name
        if target.exists():
            raise UserError(f"--include {path}: the job already has a {target.name}; rename one of them")
        if path.is_dir():
            shutil.copytree(path, target, ignore=_NOT_CODE)
        elif path.is_file():
            shutil.copy(path, target)
        else:
            raise UserError(f"--include {path}: no such file or folder")
