"""Questions to a language model behind an OpenAI-compatible endpoint: several at once, none paid for twice.

An answer that cannot be read is *silent*. Silent answers are counted; more of them than the settings allow are a
JudgeError that shows some.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, BadRequestError, OpenAI, OpenAIError

from prefarena.config import Endpoint
from prefarena.errors import JudgeError, UserError
from prefarena.judges.answers import answer_in
from prefarena.judges.calls import Calls, call_key
from prefarena.judges.usage import Usage

_EXAMPLES = 3  # shown in an error
_WRONG_SETTINGS = (401, 403, 404)  # statuses that no other row would change


class Read(Protocol):
    """The reading of an answer."""

    @property
    def reason(self) -> str:
        """The reason why it holds no verdict; empty where it holds one."""
        ...


Found = TypeVar("Found", bound=Read)


class Client(Generic[Found]):
    """One endpoint with one model, at temperature 0.

    read: reads the body of a response. missing: makes a reading, from the reason, for a row that got no response.
    schema: the JSON schema of an answer, where the settings ask for structured output.
    """

    def __init__(
        self,
        settings: Endpoint,
        read: Callable[[str], Found],
        missing: Callable[[str], Found],
        calls: str | None,
        schema: dict[str, Any],
    ) -> None:
        """`calls`: the folder of the calls that have been paid for; None: they are not kept. Raises UserError where
        the key is missing."""
        self.settings, self._key = settings, check_connection(settings)
        self._read, self._missing = read, missing
        self._calls = None if calls is None else Calls(calls)
        self.usage = Usage(num_torn=0 if self._calls is None else self._calls.num_torn)
        self._lock = threading.Lock()
        # What this server is known to want, which is found out by its refusals and never forgotten:
        self._limit_field = "max_tokens"  # or "max_completion_tokens"
        self._schema = schema if settings.structured else None  # None: it knows no structured output
        self._client = OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",  # the client insists on one
            timeout=settings.timeout_s,
            max_retries=settings.max_retries,  # of timeouts, lost connections, 408, 409, 429 and 5xx, backing off
        )

    def ask(self, questions: list[str]) -> list[Found]:
        """Return the reading of each answer, in order; equal questions are asked once.

        Raises JudgeError, with the endpoint, some rows, the reasons and the answers, where more than
        `max_silent_share` of all rows so far have no verdict, and at once where the server refuses the key or the
        model.
        """
        rows: dict[str, list[int]] = {}
        for row, question in enumerate(questions):
            rows.setdefault(question, []).append(row)
        self.usage.num_asked += len(questions)
        allowed = self.settings.max_silent_share * self.usage.num_asked
        found: dict[str, Found] = {}
        silent: dict[int, str] = {}
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            running = {pool.submit(self._answer, question, places[0]): question for question, places in rows.items()}
            for future in as_completed(running):
                question = running[future]
                found[question], shown = future.result()
                if not found[question].reason:
                    continue
                self.usage.num_silent += len(rows[question])
                silent[rows[question][0]] = f"row {rows[question][0]}: {found[question].reason}{shown}"
                if self.usage.num_silent > allowed:
                    raise JudgeError(self._too_silent(silent))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, rows that wait are not asked
            if self._calls is not None:
                self._calls.send()
        return [found[question] for question in questions]

    def _too_silent(self, silent: dict[int, str]) -> str:
        usage, share = self.usage, self.settings.max_silent_share
        examples = "; ".join(silent[row] for row in sorted(silent)[:_EXAMPLES])
        return (
            f"{self._where()}: {usage.num_silent} of {usage.num_asked} rows got no verdict, more than max_silent_share "
            f"{share:g} allows; {examples}"
        )

    def _where(self) -> str:
        return f"judge endpoint {self.settings.base_url} (model {self.settings.model})"

    def _answer(self, question: str, row: int) -> tuple[Found, str]:
        """The reading of an answer, and, if it has no verdict, the answer itself as messages show it."""
        key = call_key(self._request(question))
        kept = None if self._calls is None else self._calls.get(key)
        if kept is not None:
            with self._lock:
                self.usage.num_reused += 1
            return self._shown(kept)
        attempts = 2 if self.settings.max_retries else 1
        for attempt in range(attempts):
            try:
                body = self._asked(question)
            except OpenAIError as error:
                reason = f"no answer ({self._without_key(_told(error)):.300})"
                if isinstance(error, APIStatusError) and error.status_code in _WRONG_SETTINGS:
                    raise JudgeError(f"{self._where()}, row {row}: {reason}") from None
                if not isinstance(error, APIStatusError | APIConnectionError):
                    raise JudgeError(f"{self._where()}, row {row}: {reason}") from None
                return self._missing(reason), ""
            with self._lock:
                self.usage.num_paid += 1
            found = self._read(body)
            if not found.reason or attempt == attempts - 1:
                break
        if self._calls is not None and answer_in(body).is_completion:
            self._calls.put(key, body)
        return self._shown(body)

    def _shown(self, body: str) -> tuple[Found, str]:
        found = self._read(body)
        return found, f"; it answered {self._without_key(body)[-300:]!r}" if found.reason else ""

    def _request(self, question: str) -> dict[str, Any]:
        """The request's content that an answer depends on, whatever name the server has for the token limit."""
        settings = self.settings
        return {
            "url": settings.base_url,
            "model": settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": settings.max_tokens,
            **({"structured": True} if settings.structured else {}),
        }

    def _asked(self, question: str) -> str:
        """The body of the response, whatever it holds.

        Newer servers name the limit `max_completion_tokens`; some know no structured output. In either case it is asked
        again in the server's way.
        """
        while True:
            field, schema = self._limit_field, self._schema
            try:
                body = self._sent(question, field, schema)
            except BadRequestError as error:
                if field == "max_tokens" and "max_completion_tokens" in str(error):
                    self._limit_field = "max_completion_tokens"
                elif schema is not None and any(name in str(error) for name in ("response_format", "json_schema")):
                    self._schema = None
                else:
                    raise
                continue
            if self.settings.structured and schema is None:
                with self._lock:
                    self.usage.num_unstructured += 1
            return body

    def _sent(self, question: str, limit_field: str, schema: dict[str, Any] | None) -> str:
        extra: dict[str, Any] = {limit_field: self.settings.max_tokens}
        if schema is not None:
            form = {"name": "verdict", "strict": True, "schema": schema}
            extra["response_format"] = {"type": "json_schema", "json_schema": form}
        response = self._client.chat.completions.with_raw_response.create(
            model=self.settings.model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            extra_body=extra,
        )
        return response.text

    def _without_key(self, text: str) -> str:
        """Remove the key from a message, since servers may repeat the key that they refuse."""
        return text.replace(self._key, "(key)") if self._key else text


def _told(error: OpenAIError) -> str:
    """Describe an error with its cause: for a lost connection the client's own message says nothing else."""
    causes, cause = [str(error)], error.__cause__
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__
    return ": ".join(dict.fromkeys(text.rstrip(".") for text in causes if text))


def answer_schema(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an answer with its reason and then the field `name`, as strict servers require it."""
    return {
        "type": "object",
        "properties": {"reason": {"type": "string"}, name: value},
        "required": ["reason", name],
        "additionalProperties": False,
    }


def check_connection(settings: Endpoint) -> str | None:
    """Return the key from the environment. Raises UserError where it is not set or `base_url` is no URL."""
    if not _is_url(settings.base_url):
        raise UserError(
            f"judge endpoint: base_url must be a URL such as http://host:8000/v1, not {settings.base_url!r:.200}"
        )
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UserError(f"judge endpoint: the environment variable {settings.api_key_env} (api_key_env) is not set")
    return key


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is no number
        return False
