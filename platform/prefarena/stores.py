"""Object stores (S3, Google Cloud Storage) and other file systems behind a URL, by fsspec.

What a store answers becomes an error of the operating system's kinds, and what a user can mend one sentence.
Credentials are those of the process: a node's role, its environment, its files. There is no other way to give them.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from prefarena.errors import UserError

#: Protocol of a URL to the driver that fsspec needs for it, and to the extra of this project that brings it.
_DRIVERS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
#: Modules of drivers to those of their exceptions that no store's answer but a failed connection or login raises.
_UNREACHED = {
    "botocore.exceptions": ("BotoCoreError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "gcsfs.retry": ("HttpError",),
    "aiohttp": ("ClientError",),
}
#: Of S3, where a conditional write was not done.
_CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_REMEDY = (
    "give the nodes credentials for it, through a role, a service account or their environment (docs/cluster.md, "
    '"Credentials")'
)


def is_url(path: str) -> bool:
    """Whether `path` names something on a file system of another kind than this machine's own."""
    return "://" in path and not path.startswith(("file://", "local://"))


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, which sees what others write, and the path on it.

    Raises UserError where its driver is not installed, or there is none.
    """
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    options = {"use_listings_cache": False} if protocol in _DRIVERS else {}
    try:
        with reaching(url):
            return fsspec.core.url_to_fs(os.path.expanduser(url), **options)
    except ImportError:
        driver, extra = _DRIVERS.get(protocol, (None, None))
        if driver is None:
            raise UserError(f"{url}: no driver for {protocol}:// is installed; install it or copy the data") from None
        raise UserError(
            f"{url}: {driver} is not installed, which {protocol}:// needs; pip install 'prefarena[{extra}]'"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: this URL cannot be read ({first_line(error)})") from None


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turns what a remote store refuses within the block into a UserError that names `url`; errors of files pass.

    A FileNotFoundError passes, too, but of a bucket that does not exist.
    """
    try:
        yield
    except PermissionError as error:
        if not is_url(url):
            raise
        raise UserError(f"{url}: the store refuses access ({first_line(error)}); {_REMEDY}") from error
    except FileNotFoundError as error:
        if is_url(url) and "bucket" in str(error).lower() and "exist" in str(error).lower():
            raise UserError(f"{url}: its bucket does not exist; create it, or correct the name") from error
        raise
    except unreached() as error:
        missing = "credentials" in type(error).__name__.lower() or "credentials" in str(error).lower()
        remedy = _REMEDY if missing else "check the network, and AWS_ENDPOINT_URL if it is set"
        raise UserError(f"{url}: the store cannot be used from here ({first_line(error)}); {remedy}") from error


def unreached() -> tuple[type[Exception], ...]:
    """The exceptions of the loaded drivers where a store cannot be reached or asks for credentials."""
    loaded = {name: sys.modules[name] for name in _UNREACHED if name in sys.modules}
    return tuple(getattr(module, kind) for name, module in loaded.items() for kind in _UNREACHED[name])


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def fingerprint(url: str) -> list[list[Any]]:
    """A mark that changes with the files under a URL: name, size, and the store's own mark of the content or its time.

    Empty where nothing is there. Raises UserError where the store cannot be reached.
    """
    fs, root = file_system(url)
    with reaching(url):
        if not fs.exists(root):
            return []
        found = fs.find(root, detail=True) or {root: fs.info(root)}
    return [[name, info.get("size"), _mark(info)] for name, info in sorted(found.items())]


def _mark(info: dict[str, Any]) -> str:
    """S3's ETag, Google's generation; else the time of the last change, as the file system tells it."""
    for key in ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created"):
        if info.get(key):
            return str(info[key])
    return ""


def arrow_file_system(url: str) -> Any:
    """The file system as one of pyarrow's, for Ray Train."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(file_system(url)[0]))


# ------------------------------------------------------------------------------------------------ objects


def read(url: str) -> bytes | None:
    """The content of an object; None where there is none."""
    found = read_tagged(url)
    return None if found is None else found[0]


def write(url: str, data: bytes) -> None:
    fs, path = file_system(url)
    with system_errors():
        fs.pipe_file(path, data)


def upload(file: Path, url: str) -> None:
    fs, path = file_system(url)
    with system_errors():
        fs.put_file(str(file), path)


def download(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fs, path = file_system(url)
    with system_errors():
        fs.get_file(path, str(file))


def remove(url: str) -> None:
    """Remove an object, or all under a prefix; harmless where there is none."""
    fs, path = file_system(url)
    with system_errors():
        for name in fs.find(path):
            fs.rm_file(name)


def listed(url: str) -> dict[str, dict[str, Any]]:
    """The objects under a prefix by the rest of their names, "" for one that is `url` itself."""
    fs, path = file_system(url)
    with system_errors():
        found = fs.find(path, detail=True)
    return {name.removeprefix(path).lstrip("/"): info for name, info in found.items()}


def read_tagged(url: str) -> tuple[bytes, str] | None:
    """An object and the mark of this very content; None where there is none."""
    fs, path = file_system(url)
    try:
        with system_errors():
            if not _is_s3(url):
                return fs.cat_file(path), ""
            bucket, _, key = path.partition("/")
            answer = fs.call_s3("get_object", Bucket=bucket, Key=key)
            return fsspec.asyn.sync(fs.loop, answer["Body"].read), answer["ETag"]
    except FileNotFoundError:
        return None


def create(url: str, data: bytes) -> bool:
    """Write an object unless there is one; returns whether it did. On S3 one of several writers at most succeeds."""
    if _is_s3(url):
        return _put_if(url, data, IfNoneMatch="*")
    if read(url) is not None:
        return False
    write(url, data)
    return True


def replace(url: str, data: bytes, tag: str) -> bool:
    """Replace the object that `read_tagged` returned with `tag`; returns whether it was still there."""
    if _is_s3(url):
        return _put_if(url, data, IfMatch=tag)
    write(url, data)
    return True


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _put_if(url: str, data: bytes, **condition: str) -> bool:
    fs, path = file_system(url)
    bucket, _, key = path.partition("/")
    try:
        with system_errors():
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except OSError as error:
        code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
        if code in _CONDITION_FAILED or (isinstance(error, FileNotFoundError) and "IfMatch" in condition):
            return False
        raise
    return True


def check_output(url: str) -> str | None:
    """Raise UserError where an output cannot be kept at `url`; return a warning where leases there do not exclude."""
    probe = f"{url.rstrip('/')}/.probe-{secrets.token_hex(8)}"
    with reaching(url):
        try:
            write(probe, b"1")
            excluded = _is_s3(url) and not create(probe, b"2") and not replace(probe, b"3", '"no such mark"')
            remove(probe)
        except OSError as error:
            if isinstance(error, PermissionError | FileNotFoundError):
                raise
            raise UserError(f"{url}: the store cannot be used for output ({first_line(error)})") from error
    if excluded:
        return None
    return (
        f"output: {url} does not support the conditional writes that are used here, so two comparisons could run the "
        f"same stage at once; run one comparison at a time with this output"
    )


@contextmanager
def system_errors() -> Iterator[None]:
    """Turns a connection that failed within the block into an OSError that may pass, as network file systems do."""
    try:
        yield
    except unreached() as error:
        raise OSError(errno.ETIMEDOUT, first_line(error)) from error
