"""A model hub on loopback: serves folders as repositories, the few requests that a snapshot download makes."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repositories: dict[str, Path], *, hang: bool = False) -> Iterator[tuple[str, list[str]]]:  # noqa: C901
    """Serve repositories and yield the endpoint and the paths that were asked for.

    Args:
        repositories: Repository id to folder.
        hang: Accept connections and answer nothing.
    """
    asked: list[str] = []
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def _reply(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            while hang and not stopping.is_set():
                time.sleep(0.02)
            if path == "/":
                return self._reply(b"hub")
            for name, folder in repositories.items():
                files = sorted(file.name for file in folder.iterdir() if file.is_file())
                if path.startswith(f"/api/models/{name}/tree"):
                    entries = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files
                    ]
                    return self._reply(json.dumps(entries).encode(), headers={"Content-Type": "application/json"})
                if path.startswith(f"/api/models/{name}"):
                    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                    return self._reply(json.dumps(info).encode(), headers={"Content-Type": "application/json"})
                prefix = f"/{name}/resolve/"
                if path.startswith(prefix):
                    file = folder / path.removeprefix(prefix).split("/", 1)[1]
                    body = file.read_bytes()
                    tag = hashlib.sha256(body).hexdigest()
                    return self._reply(body, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            return self._reply(b'{"error": "not found"}', status=404, headers={"X-Error-Code": "RepoNotFound"})

        do_GET = do_HEAD = _answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
