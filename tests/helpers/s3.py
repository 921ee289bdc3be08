"""A real S3 server on loopback (moto's), in a process of its own, and the environment that leads to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pytest

BUCKET = "prefarena"
_LIMIT_S = 60.0


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Yields the environment in which `s3://` is this server, which has the one bucket BUCKET."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"moto's server does not answer (status {server.poll()})") from None
            time.sleep(0.1)


def bucket() -> fsspec.AbstractFileSystem:
    """The file system of the server that the environment leads to; it has BUCKET."""
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    return fs


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """One server for a module's tests, as the environment that leads to it."""
    with s3_server() as environment:
        yield environment


@pytest.fixture
def fs(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's file system; within the test, `s3://` leads there."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()  # file systems keep the environment that they began with
    yield bucket()
    fsspec.filesystem("s3").clear_instance_cache()
