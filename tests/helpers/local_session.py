"""Run by test_doctor.py: `prefarena doctor` in a process of its own, which tells where its local Ray listens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

from pipelines.cli import main


def listening(process: psutil.Process) -> list[str]:
    """Addresses on which a process waits for connections."""
    found = process.net_connections("inet")
    return [connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN]


def run(config: str, found: Path) -> int:
    import prefarena.cluster.session as session  # so that Ray is imported by the command, not here

    checked = session.ray_session
    from contextlib import contextmanager

    @contextmanager
    def looked_at():  # type: ignore[no-untyped-def]
        with checked() as resources:
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            addresses = [address for process in processes for address in listening(process)]
            found.write_text(json.dumps(addresses), encoding="utf-8")
            yield resources

    session.ray_session = looked_at
    return main(["doctor", config])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2])))
