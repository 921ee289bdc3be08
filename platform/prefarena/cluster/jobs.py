"""Jobs on a Ray cluster: submit, follow, look at, stop. Over HTTP to the head's dashboard, each request with a limit.

The token goes into a header and nowhere else: not to the job, its metadata or a message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from prefarena.errors import ClusterLostError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_S, _ANSWER_S = 10.0, 60.0  # longest wait for a connection, and for an answer
_UPLOAD_S = 600.0  # and for a job's files to be sent
_SILENCE_S = 30.0  # without a line of the log, after which the job's state is asked for
_RETRY_S = 1.0
STOPPED_STATUS = 143  # what a shell reports of a process that SIGTERM ended
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_STATUS = re.compile(r"status code (\d+)")  # in the message of Ray's client, which raises RuntimeError

_Answer = TypeVar("_Answer")


class RefusedError(Exception):
    """A request that the head understood and refused."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class JobClient:
    """Ray's client of one head, with a time limit on each request, and errors of one sentence."""

    def __init__(self, address: str, token: str | None) -> None:
        """Raises UserError where no head answers, or it refuses the token."""
        self.shown, self._has_token = _shown(address), token is not None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for name in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        with _no_other_address():
            #: The head's version of Ray.
            self.cluster_version = self._ask(lambda: _version(address, headers))
            self._ray = self._ask(lambda: JobSubmissionClient(address, headers=headers))

    def _ask(self, request: Callable[[], _Answer], limit_s: float = _ANSWER_S) -> _Answer:
        """Return what Ray's client gets from the head. Raises UserError, UnreachableError or RefusedError.

        Ray's client sets no limit of its own, so each request runs in a thread that is left alone when it takes longer.
        """
        outcome: Future[_Answer] = Future()

        def run() -> None:
            try:
                outcome.set_result(request())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True, name=f"request to {self.shown}").start()
        try:
            return outcome.result(limit_s)
        except AuthenticationError:
            raise UserError(self._denied()) from None
        except (requests.exceptions.JSONDecodeError, _NoHeadError):
            told = f"{self.shown}: something answers there, but it is not the dashboard of a Ray head"
            raise UserError(told) from None
        except (ConnectionError, requests.ConnectionError, requests.Timeout, FutureTimeoutError):
            raise UnreachableError(
                f"{self.shown}: no Ray head answers there; --address takes its dashboard's address "
                f"(http://HEAD:8265), and its port must be reachable from here"
            ) from None
        except requests.RequestException as error:
            raise UserError(f"{self.shown}: not the address of a Ray head ({type(error).__name__})") from None
        except RuntimeError as error:
            status = _STATUS.search(str(error))
            if status is None:
                raise
            raise RefusedError(int(status.group(1)), str(error)) from None

    def _denied(self) -> str:
        where = "RAY_AUTH_TOKEN to it, or RAY_AUTH_TOKEN_PATH to a file that holds it"
        if not self._has_token:
            return f"{self.shown}: the cluster requires a token, but none is set here; set {where}"
        return (
            f"{self.shown}: the cluster does not accept the token that is set here; set {where} to the cluster's token"
        )

    # ---------------------------------------------------------------------------------------------- jobs

    def submit(self, name: str, entrypoint: str, folder: Path) -> None:
        """Start `entrypoint` with a copy of `folder` as its working directory. Raises UserError where `name` is taken.

        The entrypoint and the folder's content can be read by everybody who can look at the cluster's jobs.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--name {name}: a name has letters, digits, '.', '_' and '-', and begins with a letter or digit"
            )
        if self.find(name) is not None:
            raise UserError(f"--name {name}: {self.shown} already has a job of this name; choose another one")
        environment = {"working_dir": str(folder)}
        self._ask(
            lambda: self._ray.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=environment), _UPLOAD_S
        )

    def find(self, name: str) -> JobDetails | None:
        """Find a job by its name, or None."""
        try:
            return self._ask(lambda: self._ray.get_job_info(name))
        except RefusedError as error:
            if error.status == 404:
                return None
            raise

    def details(self, name: str) -> JobDetails:
        """Find a job by its name. Raises UserError where there is none."""
        found = self.find(name)
        if found is None:
            raise UserError(f"{self.shown} has no job {name!r}; `prefarena status` lists them")
        return found

    def log(self, name: str) -> str | None:
        """Everything that a job has logged; None where the node that holds it is gone, or nothing was started yet."""
        self.details(name)
        try:
            return self._ask(lambda: self._ray.get_job_logs(name))
        except RefusedError:
            return None

    def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        """Yield what a job logs, from its start, as Ray's client follows it."""
        return self._ray.tail_job_logs(name)

    def jobs(self) -> list[JobDetails]:
        """All jobs of the cluster."""
        return self._ask(self._ray.list_jobs)

    def stop(self, name: str, limit_s: float) -> JobDetails:
        """End a job, and wait until it has. Raises ClusterLostError where it takes longer than `limit_s`."""
        details, deadline = self.details(name), time.monotonic() + limit_s
        if not has_ended(details):
            self._ask(lambda: self._ray.stop_job(name))
        while not has_ended(details):
            if time.monotonic() >= deadline:
                raise ClusterLostError(f"waited {limit_s:g} s for job {name!r} to end; it is {details.status.value}")
            time.sleep(_RETRY_S)
            details = self.details(name)
        return details


class UnreachableError(UserError):
    """No head at the address."""


def connect(address: str | None) -> JobClient:
    """Connect to the head at `address`, or to the one that Ray's own variables name. Raises UserError.

    The token is looked for where Ray looks: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.
    """
    return JobClient(head_address(address, os.environ), read_token(os.environ, Path.home()))


def head_address(address: str | None, environment: Mapping[str, str]) -> str:
    """The dashboard's URL: as given, else RAY_API_SERVER_ADDRESS, else an http RAY_ADDRESS, else this machine's."""
    if address is None:
        of_ray = environment.get("RAY_ADDRESS", "")
        address = environment.get("RAY_API_SERVER_ADDRESS") or (of_ray if of_ray.startswith("http") else "")
        address = address or DEFAULT_ADDRESS
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--address {_shown(address)}: this must be the http(s) URL of the head's dashboard, like {DEFAULT_ADDRESS}"
        )
    return address.rstrip("/")


def read_token(environment: Mapping[str, str], home: Path) -> str | None:
    """The cluster's token where Ray keeps it; None where there is none. Raises UserError where it cannot be read."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    if not named and not path.is_file():
        if mode == "token":
            raise UserError("RAY_AUTH_MODE is token, but there is none; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
        return None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the token file cannot be read ({type(error).__name__})") from None
    if not token:
        raise UserError(f"{path}: the token file is empty")
    return token


class _NoHeadError(Exception):
    """The server that answers is not the dashboard of a Ray head."""


def _version(address: str, headers: Mapping[str, str]) -> str:
    """The head's version of Ray. Asked before Ray's client is made, which would wait for a connection without limit."""
    response = requests.get(f"{address}/api/version", headers=headers, timeout=(_CONNECT_S, _ANSWER_S))
    if response.status_code in (401, 403):
        raise AuthenticationError(response.text)
    answer = response.json() if "json" in response.headers.get("content-type", "") else None
    if not isinstance(answer, dict) or "ray_version" not in answer:
        raise _NoHeadError
    return str(answer["ray_version"])


@contextmanager
def _no_other_address() -> Iterator[None]:
    """A context in which Ray's variables do not override the given address, as they do for Ray's client."""
    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _shown(address: str) -> str:
    """Return an address for messages, without user name and password."""
    return re.sub(r"//[^/@]*@", "//", address)


# ------------------------------------------------------------------------------------------------ states


def has_ended(details: JobDetails) -> bool:
    """Whether a job is over, one way or another."""
    return bool(details.status.is_terminal())


def exit_status(details: JobDetails) -> int:
    """The exit status of a job that has ended, as a shell would report it.

    Stopped: 143. Failed without an exit code (the job's process never started, or its node went away): 1.
    """
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED_STATUS
    code = details.driver_exit_code or 1
    return code if code > 0 else 128 - code


def describe(details: JobDetails) -> str:
    """Describe a job's state in one line; for a failure, with Ray's reason but not the log that it repeats."""
    text = details.status.value
    if has_ended(details):
        text += f", exit status {exit_status(details)}"
    if details.status == JobStatus.FAILED and details.driver_exit_code is None:
        text += f" ({details.error_type or 'no reason given'}: {' '.join((details.message or '').split())[:300]})"
    return text


# ------------------------------------------------------------------------------------------------ logs


def follow(client: JobClient, name: str, write: Callable[[str], Any], patience_s: float = 60.0) -> JobDetails:
    """Pass on what a job logs, from its start, until it ends. Returns how it ended.

    A lost connection is made again, and nothing is passed on twice. Raises ClusterLostError where the head does not
    answer for `patience_s`.
    """
    client.details(name)
    return asyncio.run(_follow(client, name, write, patience_s))


async def _follow(client: JobClient, name: str, write: Callable[[str], Any], patience_s: float) -> JobDetails:
    written = 0
    while True:
        async for piece in _tail(client, name, patience_s):
            new = piece.after(written)
            if new:
                write(new)
                written += len(new)
        details = await _details(client, name, patience_s)
        if has_ended(details):
            if rest := (client.log(name) or "")[written:]:
                write(rest)
            return details
        await asyncio.sleep(_RETRY_S)


class _Piece:
    """A part of a log, and where in the log it starts."""

    def __init__(self, text: str, start: int) -> None:
        self._text, self._start = text, start

    def after(self, position: int) -> str:
        """Return the part of it that lies after `position`."""
        return self._text[max(0, position - self._start) :]


async def _tail(client: JobClient, name: str, patience_s: float) -> Any:
    """Yield pieces of a log from its start, until the job ends or the connection is lost."""
    stream, position = client.tail_job_logs(name), 0
    waiting = asyncio.ensure_future(_next(stream))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=_SILENCE_S)
            if not done:
                if has_ended(await _details(client, name, patience_s)):
                    return
                continue
            try:
                text = waiting.result()
            except (aiohttp.ClientError, OSError, RuntimeError):  # RuntimeError: closed by neither side's wish
                return
            if text is None:
                return
            yield _Piece(text, position)
            position += len(text)
            waiting = asyncio.ensure_future(_next(stream))
    finally:
        waiting.cancel()


async def _next(stream: Any) -> str | None:
    try:
        return str(await stream.__anext__())
    except StopAsyncIteration:
        return None


async def _details(client: JobClient, name: str, patience_s: float) -> JobDetails:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return client.details(name)
        except UnreachableError as error:
            if time.monotonic() >= deadline:
                raise ClusterLostError(
                    f"{client.shown} has not answered for {patience_s:g} s; job {name!r} may still run there: "
                    f"`prefarena logs {name} --follow` goes on with it"
                ) from error
            await asyncio.sleep(_RETRY_S)
