"""A hub on loopback: serves folders as repositories, the few requests that snapshots and datasets make."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub.constants
import pytest
from huggingface_hub import HfFileSystem

from emtool.engines.model_files import hub_is_reachable

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(  # noqa: C901
    repositories: dict[str, Path], *, hang: bool = False, gated: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories and yield the endpoint and the paths that were asked for.

    Args:
        repositories: Repository id to folder; the id of a dataset begins with "datasets/".
        hang: Accept connections and answer nothing.
        gated: Repositories whose files are refused until access is granted.
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
                files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
                api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
                if path.startswith((f"{api}/tree", f"{api}/paths-info")):
                    wanted = self._wanted(files)
                    entries = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40}
                        for f in wanted
                    ]
                    return self._reply(json.dumps(entries).encode(), headers={"Content-Type": "application/json"})
                if path.startswith(api):
                    info = {
                        "id": name.removeprefix("datasets/"),
                        "sha": COMMIT,
                        "siblings": [{"rfilename": f} for f in files],
                    }
                    return self._reply(json.dumps(info).encode(), headers={"Content-Type": "application/json"})
                prefix = f"/{name}/resolve/"
                if path.startswith(prefix) and name in gated:
                    return self._reply(b"{}", status=403, headers={"X-Error-Code": "GatedRepo"})
                if path.startswith(prefix):
                    file = folder / path.removeprefix(prefix).split("/", 1)[1]
                    if not file.is_file():
                        return self._reply(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
                    body = file.read_bytes()
                    tag = hashlib.sha256(body).hexdigest()
                    return self._reply(body, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            return self._reply(b'{"error": "not found"}', status=404, headers={"X-Error-Code": "RepoNotFound"})

        def _wanted(self, files: list[str]) -> list[str]:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", files)
            return [file for file in files if file in asked]

        do_GET = do_HEAD = do_POST = _answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def dataset_hub(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, *, cache: Path, gated: tuple[str, ...] = ()
) -> Iterator[list[str]]:
    """Serve datasets as the hub of this process, and yield the paths that are asked for.

    Args:
        repositories: Repository id to folder.
        monkeypatch: Undoes the change of the libraries' settings, which they read when they are imported.
        cache: The hub's local cache.
        gated: Repositories that are refused until access is granted.
    """
    hub_is_reachable.cache_clear()
    with serve_hub(repositories, gated=gated) as (endpoint, asked):
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        yield asked
    HfFileSystem.clear_instance_cache()
    hub_is_reachable.cache_clear()
