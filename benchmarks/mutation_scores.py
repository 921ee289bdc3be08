"""The score of each module after `make mutation`, as a table in Markdown, and the mutants that no test noticed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

#: Exit statuses with which mutmut records that the tests passed, and that no test runs the function.
SURVIVED, NO_TESTS = 0, (5, 33)


def main(folder: str = "build/mutation/mutants/src/prefarena") -> None:
    """Print the table and the survivors. A mutant that has not been run counts in neither column."""
    survivors: list[str] = []
    print("| module | mutants run | killed | survived | no test | not run |\n|---|---|---|---|---|---|")
    for path in sorted(Path(folder).rglob("*.py.meta")):
        statuses = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if not statuses:
            continue
        ran = {name: status for name, status in statuses.items() if status is not None}
        survived = sorted(name for name, status in ran.items() if status == SURVIVED)
        untested = sorted(name for name, status in ran.items() if status in NO_TESTS)
        survivors += [*survived, *(f"{name} (no test)" for name in untested)]
        killed = len(ran) - len(survived) - len(untested)
        share = f" ({killed / len(ran):.1%})" if ran else ""
        module = str(path.relative_to(folder)).removesuffix(".meta")
        counts = f"{len(survived)} | {len(untested)} | {len(statuses) - len(ran)}"
        print(f"| `{module}` | {len(ran)} | {killed}{share} | {counts} |")
    print("\n".join(["", *survivors]))


if __name__ == "__main__":
    main(*sys.argv[1:])
