"""One file over HTTP: resumed where it stopped, bounded in time and size, every failure one line.

A later attempt asks for the rest on condition that the file is still the same, so a file that has changed, or a server
that does not serve parts, begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit, urlunsplit

from emtool.core.disk import format_bytes
from emtool.core.errors import BackendError, ConfigError, DataError, MissingDependencyError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.engines.partial_file import PartialFile

if TYPE_CHECKING:
    from requests import Response, Session

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
#: Answers that may be better a little later.
_PASSING = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, kw_only=True)
class DownloadLimits:
    """How long and how much a download may take.

    Attributes:
        connect_seconds: Time to reach the server.
        read_seconds: Time without a byte after which the connection counts as dead.
        waits: Seconds before each further attempt; as many attempts follow the first.
        max_bytes: Largest file.
    """

    connect_seconds: float = 15.0
    read_seconds: float = 60.0
    waits: tuple[float, ...] = (1.0, 4.0, 10.0)
    max_bytes: int = 256 << 20


@contextlib.contextmanager
def downloaded(
    url: str,
    folder: Path,
    *,
    limits: DownloadLimits,
    on_event: EventSink,
    local_copy: str = "give a local copy with --from",
) -> Iterator[Path]:
    """Download a file, yield its path while the block runs, and remove it then; what is incomplete stays.

    Args:
        url: Its address, http or https.
        folder: Where it is kept meanwhile; made if it is not there.
        limits: How long and how much it may take.
        on_event: Where progress is reported, in bytes.
        local_copy: How a file of this machine is given instead, for messages.

    Raises:
        BackendError: If it could not be fetched; says what is kept.
        ConfigError: If the address is not one to fetch from.
        DataError: If it is larger than allowed.
        MissingDependencyError: If the package that fetches is not installed.
    """
    check_url(url)
    folder.mkdir(parents=True, exist_ok=True)
    part = PartialFile(path=folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part")
    with part.held():
        _Download(url=url, part=part, limits=limits, on_event=on_event, local_copy=local_copy).complete()
        try:
            yield part.path
        finally:
            part.remove()


def check_url(url: str) -> None:
    """Refuse an address that is not plain http or https.

    Raises:
        ConfigError: If it is of another scheme, names no host, or holds a user name.
    """
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(f"cannot fetch from {url!r}; give an http or https address, a file or a folder")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"the address {shown_url(url)} holds a user name or password, which would be recorded")


def may_redirect(before: str, target: str) -> bool:
    """Return whether a redirect is followed: never to another scheme than http and https, never from https to http."""
    allowed = ("https",) if urlsplit(before).scheme == "https" else ("http", "https")
    return urlsplit(target).scheme in allowed


def shown_url(url: str) -> str:
    """Return an address without what may be secret in it: user name, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class _PassingError(Exception):
    """A failure that another attempt may not meet."""


@dataclass(frozen=True, kw_only=True)
class _Download:
    """A file on its way."""

    url: str
    part: PartialFile
    limits: DownloadLimits
    on_event: EventSink
    local_copy: str

    def complete(self) -> None:
        """Bring the file to its whole length, in as many attempts as are allowed."""
        try:
            import requests
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "downloading needs the package requests: pip install 'emtool[data]'"
            ) from error

        self.on_event(PhaseStarted(name=f"downloading {shown_url(self.url)}"))
        with requests.Session() as session:
            for wait in (*self.limits.waits, None):
                try:
                    self._attempt(session)
                except _PassingError as error:
                    if wait is None:
                        raise self._failure(str(error), self._what_is_kept()) from error
                    self.on_event(Notice(text=f"{error}; trying again in {wait:g} s", is_warning=True))
                    time.sleep(wait)
                else:
                    return

    def _failure(self, reason: str, advice: str = "") -> BackendError:
        return BackendError(f"cannot fetch {shown_url(self.url)}: {reason}; {advice or self.local_copy}")

    def _what_is_kept(self) -> str:
        if self.part.can_go_on:
            kept = f"{format_bytes(self.part.num_bytes)} are kept in {self.part.path}"
            return f"{kept} and the same command goes on from there, or {self.local_copy}"
        self.part.remove()
        return f"nothing is kept; try again later, or {self.local_copy}"

    def _attempt(self, session: Session) -> None:
        """Ask for what is missing and append it."""
        import requests

        headers = {"Accept-Encoding": "identity"}
        if self.part.can_go_on:
            headers |= {"Range": f"bytes={self.part.num_bytes}-", "If-Range": str(self.part.validator)}
        host = urlsplit(self.url).hostname
        try:
            with self._follow(session, headers) as response:
                self._receive(response, self._accept(response))
        except requests.exceptions.SSLError as error:
            raise self._failure("its certificate is not accepted") from error
        except requests.exceptions.Timeout as error:
            raise _PassingError(f"{host} does not answer") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _PassingError(f"the connection was cut off after {format_bytes(self.part.num_bytes)}") from error
        except requests.exceptions.ConnectionError as error:
            raise _PassingError(f"{host} {_connection_reason(error)}") from error
        except requests.exceptions.RequestException as error:
            raise self._failure(str(error).splitlines()[0]) from error

    def _follow(self, session: Session, headers: dict[str, str]) -> Response:
        """Return the answer to a request after the redirects that are allowed."""
        target, timeout = self.url, (self.limits.connect_seconds, self.limits.read_seconds)
        for _ in range(MAX_REDIRECTS + 1):
            response = session.get(target, headers=headers, stream=True, allow_redirects=False, timeout=timeout)
            if not response.is_redirect:
                return response
            before, target = target, urljoin(target, response.headers["Location"])
            response.close()
            if not may_redirect(before, target):
                raise self._failure(f"it redirects to {shown_url(target)}, which is less safe and not followed")
        raise self._failure(f"more than {MAX_REDIRECTS} redirects")

    def _accept(self, response: Response) -> int | None:
        """Check an answer, make the part what it goes on from, and return the file's size where it is known."""
        status = response.status_code
        if status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            self.part.remove()
            raise _PassingError("the file on the server is another one by now")
        answer = f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
        if status in _PASSING:
            raise _PassingError(answer)
        if status not in (200, 206):
            raise self._failure(answer, f"check the address, or {self.local_copy}")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise self._failure(f"the server sends it compressed ({encoding}) although it was asked not to")
        if status == 206:
            return self._go_on(response)
        if self.part.num_bytes:
            self.on_event(Notice(text="the server begins anew: the file has changed, or it serves no parts"))
        self.part.begin(url=shown_url(self.url), validator=_validator(response))
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None

    def _go_on(self, response: Response) -> int | None:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        is_same = _validator(response) in (None, self.part.validator)
        if found is None or int(found[1]) != self.part.num_bytes or not is_same:
            self.part.remove()
            raise _PassingError("the server sent another part than was asked for")
        self.on_event(Notice(text=f"going on after {format_bytes(self.part.num_bytes)}"))
        return None if found[2] == "*" else int(found[2])

    def _receive(self, response: Response, total: int | None) -> None:
        self._check_size(total or 0)
        count = self.part.num_bytes
        size = "a file of unknown size" if total is None else format_bytes(total)
        self.on_event(PhaseStarted(name=f"receiving {size}", total=total, unit="bytes"))
        with self.part.path.open("ab") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                count += len(chunk)
                self._check_size(count)
                file.write(chunk)
                self.on_event(StepFinished(step=count))
        if total is not None and count != total:
            raise _PassingError(f"the connection was cut off after {format_bytes(count)} of {format_bytes(total)}")

    def _check_size(self, count: int) -> None:
        if count > self.limits.max_bytes:
            self.part.remove()
            raise DataError(
                f"{shown_url(self.url)} serves {format_bytes(count)} or more, and at most "
                f"{format_bytes(self.limits.max_bytes)} are taken: this is not the file that is meant"
            )


def _validator(response: Response) -> str | None:
    """Return what names this very content; a weak ETag names only something like it."""
    tag = response.headers.get("ETag")
    if tag is not None:
        return tag if tag.startswith('"') else None
    return response.headers.get("Last-Modified")


def _connection_reason(error: BaseException) -> str:
    """Return why a connection failed, in few words: libraries wrap the system's reason several times."""
    from urllib3.exceptions import NameResolutionError, ReadTimeoutError

    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ReadTimeoutError):
            return "sends nothing more"
        if isinstance(inner, NameResolutionError):
            return "is not a host that is known here"
        if isinstance(inner, OSError) and inner.strerror:
            return f"cannot be reached: {inner.strerror.lower()}"
        inner = inner.__cause__ or inner.__context__
    logger.info("a connection failed: %s", error)
    return "cannot be reached"
