"""A file server on loopback that fails on demand: real sockets, real cuts."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.serving import serving


@dataclass
class ServedFile:
    """A file and how it is served.

    Attributes:
        body: Its bytes.
        etag: Its ETag; None serves none.
        has_ranges: Whether parts are served.
        faults: What goes wrong with each request in turn, then nothing: an int cuts the connection after so many bytes
            of the body, "500" and "404" are answers, "hang" sends half and then nothing, "reset" resets the connection,
            "wrong part" serves another part, "slow" sends in small pieces, and "to URL" redirects.
        has_length: Whether the length is told.
    """

    body: bytes
    etag: str | None = '"1"'
    has_ranges: bool = True
    faults: list[int | str] = field(default_factory=list)
    has_length: bool = True


@dataclass
class FileServer:
    """What is served, and the headers of each request."""

    address: str
    files: dict[str, ServedFile]
    requests: list[dict[str, str]] = field(default_factory=list)

    def url(self, path: str) -> str:
        """Return the address of a file."""
        return self.address + path


@contextmanager
def serve_files(files: dict[str, ServedFile]) -> Iterator[FileServer]:  # noqa: C901
    """Serve files by path while the block runs."""
    stopping = threading.Event()
    served = FileServer(address="", files=files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _status(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Connection": "close", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = True

        def do_GET(self) -> None:
            served.requests.append(dict(self.headers))
            self._answer()

        def _answer(self) -> None:
            file = files.get(self.path.partition("?")[0])
            fault = file.faults.pop(0) if file is not None and file.faults else None
            if isinstance(fault, str) and fault.startswith("to "):
                return self._status(302, {"Location": fault.removeprefix("to "), "Content-Length": "0"})
            if file is None or (isinstance(fault, str) and fault.isdigit()):
                return self._status(int(fault or 404), {"Content-Length": "0"})
            if fault == "reset":
                return self._reset()
            start, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if asked and file.has_ranges and self.headers.get("If-Range", file.etag) == file.etag:
                start = int(asked[1])
            headers = {"ETag": file.etag} if file.etag else {}
            if start >= len(file.body) > 0 and start:
                return self._status(416, {"Content-Range": f"bytes */{len(file.body)}", "Content-Length": "0"})
            rest = file.body[start:]
            if file.has_length:
                headers["Content-Length"] = str(len(rest))
            shown = start - 1 if fault == "wrong part" else start
            if start:
                headers["Content-Range"] = f"bytes {shown}-{len(file.body) - 1}/{len(file.body)}"
            self._status(206 if start else 200, headers)
            return self._send(rest, fault)

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        def _send(self, rest: bytes, fault: int | str | None) -> None:
            if isinstance(fault, int):
                self.wfile.write(rest[:fault])
            elif fault == "hang":
                self.wfile.write(rest[: len(rest) // 2])
                self.wfile.flush()
                while not stopping.is_set():
                    time.sleep(0.02)
            elif fault == "slow":
                piece = len(rest) // 10 + 1
                for at in range(0, len(rest), piece):
                    self.wfile.write(rest[at : at + piece])
                    self.wfile.flush()
                    time.sleep(0.02)
            else:
                self.wfile.write(rest)

    with serving(Handler, stopping) as address:
        served.address = address
        yield served
