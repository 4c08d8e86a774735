"""Requests to servers that speak the OpenAI protocol: one place for what judge and backend share.

The `openai` package does the waiting: it repeats what failed by 408, 409, 429, 5xx, time-out or a broken connection,
after the server's Retry-After (up to two minutes), else after 0.5 to 8 seconds with jitter. Here is what it leaves
open: no redirects, no settings from its own environment variables, bounded answers, and no key in any text.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from emtool import __version__
from emtool.core.errors import MissingDependencyError
from emtool.core.server_address import ServerAddress, ServerKey

#: Far above any answer's JSON; more is not read.
MAX_BODY_BYTES = 4 << 20

#: Characters of a server's own words that are shown or kept.
MAX_REASON = 200

#: What a server without a key is sent: the protocol's clients must send one.
PLACEHOLDER_KEY = "none"

#: Longest wait that a server may ask for. Source: MAX_RETRY_AFTER_DELAY in openai's _constants.py.
_MAX_WAIT_SECONDS = 120.0

#: Statuses after which every other request would fail as well.
_FATAL = {401, 402, 403, 404}

JsonObject = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        method: "GET" or "POST".
        path: Path below the base URL, with a slash before it.
        body: JSON values to send; None for none.
        is_json: Whether a JSON object must come back; if not, its text is not read.
    """

    method: str = "POST"
    path: str = "/chat/completions"
    body: Mapping[str, Any] | None = None
    is_json: bool = True


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no result, after all retries.

    Attributes:
        text: One short printable line without keys.
        status: HTTP status; None where there was no answer.
        is_fatal: Whether every other request would fail as well: wrong key, no such model, a redirect.
    """

    text: str
    status: int | None = None
    is_fatal: bool = False

    @property
    def is_passing(self) -> bool:
        """Return whether it is of the kind that a server recovers from, and that retries should have mended."""
        return self.status is None or self.status in {408, 409, 429} or self.status >= 500

    @property
    def is_refusal_of_request(self) -> bool:
        """Return whether the server understood the request and does not accept what it asks for."""
        return self.status in {400, 422}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server and how it is spoken to.

    Attributes:
        address: Where it is.
        key: The key that it is sent.
        timeout_seconds: How long one try may wait for the server.
        max_retries: How often a request is repeated.
    """

    address: ServerAddress
    key: ServerKey
    timeout_seconds: float
    max_retries: int = 6

    def clean(self, text: str) -> str:
        """Return a text from the server as one short printable line without the key."""
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        return self.without_key(line)[:MAX_REASON]

    def without_key(self, text: str) -> str:
        """Return a text with the key masked."""
        return text if self.key.value is None else text.replace(self.key.value, "***")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """Open connections for requests of one event loop, and close them.

        Raises:
            MissingDependencyError: If the `openai` package is not installed.
        """
        openai = import_openai()
        transport = openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            # A proxy of the environment is for the outside world; on this machine it would only see the key.
            trust_env=not self.address.is_loopback,
            event_hooks={"request": [self._set_headers], "response": [self._bound_body]},
        )
        client = openai.AsyncOpenAI(
            base_url=self.address.url,
            api_key=self._sent_key,
            admin_api_key="",
            organization="",
            project="",
            max_retries=self.max_retries,
            timeout=self.timeout_seconds,
            http_client=transport,
        )
        async with client:
            yield Connection(server=self, client=client)

    @property
    def _sent_key(self) -> str:
        return self.key.value or PLACEHOLDER_KEY

    async def _set_headers(self, request: Any) -> None:
        # The package adds headers from OPENAI_CUSTOM_HEADERS, organisation and project, and what it knows of this
        # machine; the first may even replace the key.
        for name in list(request.headers):
            if name.lower() not in {"host", "content-length", "transfer-encoding", "connection"}:
                del request.headers[name]
        request.headers["Authorization"] = f"Bearer {self._sent_key}"
        request.headers["Accept"] = "application/json"
        request.headers["Content-Type"] = "application/json"
        # Compressed, a small answer could become a large one.
        request.headers["Accept-Encoding"] = "identity"
        request.headers["User-Agent"] = f"emtool/{__version__}"

    async def _bound_body(self, response: Any) -> None:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _unusable("the server sent a compressed answer, which was not asked for")
        response.stream = _bounded(response.stream)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Open connections to a server.

    Attributes:
        server: The server.
        client: The `openai` package's client.
    """

    server: Server
    client: Any

    async def ask(self, request: Request) -> JsonObject | Failure:
        """Send a request, with retries, and return the JSON object that came back or why there is none.

        Texts in it have the key masked and hold no half of a surrogate pair, so that they can be kept.
        """
        import httpx2

        openai = import_openai()
        tries = self.server.max_retries + 1
        # A server that sends a byte now and then never times out by itself.
        limit = tries * (2 * self.server.timeout_seconds + _MAX_WAIT_SECONDS)
        try:
            async with asyncio.timeout(limit):
                call = self.client.get if request.method == "GET" else self.client.post
                body = {} if request.body is None else {"body": request.body}
                response = await call(request.path, cast_to=httpx2.Response, **body)
        except openai.APIStatusError as error:
            return self._refused(error.status_code, error.response.content)
        except (openai.APITimeoutError, TimeoutError):
            return Failure(text=f"no answer within {self.server.timeout_seconds:g} s, tries: {tries}")
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ or error
            reason = self.server.clean(str(cause)) or type(cause).__name__
            return Failure(text=f"the connection broke or could not be made ({reason}), tries: {tries}")
        except openai.OpenAIError as error:
            return Failure(text=self.server.clean(str(error)), status=200)
        return self._parse(response.content) if request.is_json else {}

    def _refused(self, status: int, body: bytes) -> Failure:
        said = self.server.clean(_reason(body))
        is_fatal = status in _FATAL or status < 400 or (status == 429 and b'"insufficient_quota"' in body)
        return Failure(text=f"{status}: {said}" if said else f"{status}", status=status, is_fatal=is_fatal)

    def _parse(self, body: bytes) -> JsonObject | Failure:
        try:
            value = json.loads(body)
            if isinstance(value, dict):
                cleaned: JsonObject = self._storable(value)
                return cleaned
        except (ValueError, RecursionError):
            return Failure(text="the server's answer is not JSON", status=200)
        return Failure(text="the server's answer is not a JSON object", status=200)

    def _storable(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.server.without_key(value.encode("utf-8", "replace").decode("utf-8"))
        if isinstance(value, list):
            return [self._storable(item) for item in value]
        if isinstance(value, dict):
            return {self._storable(name): self._storable(item) for name, item in value.items()}
        return value


def import_openai() -> Any:
    """Return the `openai` package.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise MissingDependencyError(
            "talking to a server that speaks the OpenAI protocol needs the openai package: pip install 'emtool[judge]'"
        ) from error
    return openai


def _unusable(reason: str) -> Exception:
    error: Exception = import_openai().OpenAIError(reason)
    return error


def _bounded(stream: Any) -> Any:
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            num_bytes = 0
            async for chunk in stream:
                num_bytes += len(chunk)
                if num_bytes > MAX_BODY_BYTES:
                    raise _unusable(f"the server's answer is longer than {MAX_BODY_BYTES:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def _reason(body: bytes) -> str:
    """Return what a server says of a refusal, whatever its shape."""
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return next(_messages(value), text)


def _messages(value: Any) -> Iterator[str]:
    while isinstance(value, dict):
        message = value.get("message", value.get("detail"))
        if isinstance(message, str):
            yield message
        value = value.get("error")
    if isinstance(value, str):
        yield value
