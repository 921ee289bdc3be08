"""A method that is a file in a folder of its own, tried in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def tried(toy: str, use: str, folder: Path) -> dict[str, Any]:
    """What `use` prints last, as JSON; it finds the folder with the file toy.py in argv[1], and `folder` in argv[2].

    In a process of its own, as unions are made when `prefarena.config` is imported.
    """
    (folder / "more").mkdir()
    (folder / "more" / "toy.py").write_text(toy, encoding="utf-8")
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, 'tests/helpers')" + use, str(folder / "more")]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
