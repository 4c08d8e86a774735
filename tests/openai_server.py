"""A server on loopback that speaks the OpenAI protocol and fails on demand: real sockets, real cuts."""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.serving import serving

#: Takes the body of a chat completion request, and returns the answer: see `reply` and `Fault`.
Script = Callable[[dict[str, Any]], "dict[str, Any] | Fault"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An answer that is none.

    Attributes:
        status: HTTP status.
        body: The body as sent.
        headers: Headers beside those of every answer.
        cut: "reset" breaks the connection before an answer, "short" within its body, and "hang" sends nothing.
    """

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: str | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class OpenAIServer:
    """What is served, and what was asked.

    Attributes:
        url: Base URL.
        script: Answers chat completions.
        models: Names that /models lists.
        can_load: Whether adapters can be loaded at run time.
        latency: Seconds before each chat completion.
        requests: What was asked, in the order of arrival.
        most_in_flight: Most chat completions that were open at once.
        roots: Where /models says that it got a model.
    """

    url: str
    script: Script
    models: list[str]
    can_load: bool
    latency: float
    requests: list[Asked] = field(default_factory=list)
    most_in_flight: int = 0
    roots: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def chats(self) -> list[dict[str, Any]]:
        """Return the bodies of the chat completions that were asked for."""
        return [asked.body for asked in self.requests if asked.path.endswith("/chat/completions")]


def retry(status: int, *, text: str = "try again") -> Fault:
    """Return a refusal that asks to come back at once, so that tests need not wait."""
    body = json.dumps({"error": {"message": text}}).encode()
    return Fault(status=status, body=body, headers={"Retry-After": "0.01"})


def reply(
    text: str, top: Mapping[str, float] | None = None, *, finish: str = "stop", tokens: int | None = None
) -> dict[str, Any]:
    """Return a chat completion.

    Args:
        text: The answer.
        top: Probabilities of the first token's alternatives; None for a server that gives none.
        finish: Why it ended.
        tokens: Tokens of the answer, for `usage`.
    """
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        alternatives = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": alternatives}]}
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return {"id": "1", "object": "chat.completion", "choices": [choice], **usage}


@contextmanager
def serve_openai(  # noqa: C901
    script: Script, *, models: tuple[str, ...] = (), can_load: bool = False, latency: float = 0.0
) -> Iterator[OpenAIServer]:
    """Serve the protocol below /v1 while the block runs."""
    stopping = threading.Event()
    lock = threading.Lock()
    in_flight: set[int] = set()
    served = OpenAIServer(url="", script=script, models=list(models), can_load=can_load, latency=latency)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._route({})

        def do_POST(self) -> None:
            self._route(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

        def _route(self, body: dict[str, Any]) -> None:
            asked = Asked(method=self.command, path=self.path, headers=dict(self.headers), body=body)
            with lock:
                served.requests.append(asked)
            if self.path == "/v1/models":
                listed = [{"id": name, "root": served.roots.get(name)} for name in served.models]
                return self._send({"object": "list", "data": listed})
            if self.path in {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} and served.can_load:
                change = served.models.append if self.path.startswith("/v1/load") else served.models.remove
                change(body["lora_name"])
                return self._send(Fault(body=b"Success: as vLLM says it, which is no JSON"))
            if self.path != "/v1/chat/completions":
                return self._send(Fault(status=404, body=b'{"detail":"Not Found"}'))
            return self._chat(body)

        def _chat(self, body: dict[str, Any]) -> None:
            mine = threading.get_ident()
            with lock:
                in_flight.add(mine)
                served.most_in_flight = max(served.most_in_flight, len(in_flight))
            try:
                if served.latency:
                    time.sleep(served.latency)
                answer = served.script(body)
            finally:
                with lock:
                    in_flight.discard(mine)
            self._send(answer)

        def _send(self, answer: dict[str, Any] | Fault) -> None:
            fault = answer if isinstance(answer, Fault) else Fault(body=json.dumps(answer).encode())
            if fault.cut == "hang":
                stopping.wait()
            if fault.cut in {"reset", "hang"}:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(fault.status)
            length = len(fault.body) + (7 if fault.cut == "short" else 0)
            for name, value in {"Content-Length": str(length), **fault.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = fault.cut == "short"
            self.wfile.write(fault.body)

    with serving(Handler, stopping) as address:
        served.url = f"{address}/v1"
        yield served
