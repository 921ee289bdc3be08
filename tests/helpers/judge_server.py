"""A real OpenAI-compatible server on loopback, and the settings of a judge that asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prefarena.config import EndpointJudge


@dataclass
class Server:
    """An OpenAI-compatible server on this machine: it answers with the number of letters in the request's last word.

    failures: statuses that the next requests get instead. answer: a fixed answer, or the answer to a question. raw: a
    fixed body. newer: the server refuses `max_tokens`. plain: it refuses structured output. delay_s: before each
    answer.
    """

    url: str = ""
    failures: list[int] = field(default_factory=list)
    answer: str | Callable[[str], str] | None = None
    raw: str | None = None
    newer: bool = False
    plain: bool = False
    delay_s: float = 0
    requests: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body)
                state.keys.append(self.headers.get("Authorization"))
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
                status = state.failures.pop(0) if state.failures else 200
            time.sleep(state.delay_s)
            text = body["messages"][0]["content"]
            if callable(state.answer):
                answer = state.answer(text)
            else:
                answer = state.answer or f"Score: {len(text.split('|')[1].split())}.5 of 10"
            content: dict[str, object] = {
                "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
                ],
            }  # fmt: skip
            if status != 200:
                content = {"error": {"message": f"refused {self.headers.get('Authorization')}"}}
            if state.newer and "max_tokens" in body:
                status = 400
                content = {"error": {"message": "'max_tokens' is not supported; use 'max_completion_tokens'."}}
            elif state.plain and "response_format" in body:
                status = 400
                content = {"error": {"message": "Unknown parameter: 'response_format'."}}
            with state.lock:
                state.in_flight -= 1
            data = (state.raw if state.raw is not None else json.dumps(content)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if data[:1] == b"<" else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    class Listener(ThreadingHTTPServer):
        # Connections that wait to be accepted. Of a judge's 16 at once, the default of 5 lets the kernel reset some.
        request_queue_size = 128

    http = Listener(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()


def endpoint(server: Server, **settings: object) -> EndpointJudge:
    fields = {"base_url": server.url, "model": "m", "prompt": "{prompt}|{response}", "max_retries": 0, **settings}
    return EndpointJudge.model_validate(fields)
