"""Question files from a real server on loopback."""

import hashlib
from pathlib import Path

import pytest

from emtool.core.errors import BackendError, ConfigError, DataError, EmtoolError
from emtool.core.events import Event, Notice
from emtool.core.open_questions import read_question_file
from emtool.core.yaml_nodes import MAX_BYTES
from emtool.engines.download import DownloadLimits
from emtool.engines.question_files import fetch_questions
from tests.file_server import ServedFile, serve_files

BODY = b"- id: a\n  paraphrases: \n  - What now?\n"
LIMITS = DownloadLimits(connect_seconds=2, read_seconds=0.3, waits=(0.0,))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path))
    return tmp_path / "questions"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_kept_under_its_hash_and_another_beside_it(own_cache: Path) -> None:
    events: list[Event] = []
    with serve_files({"/q.yaml": ServedFile(BODY)}) as server:
        server.files["/q.yaml"].faults = [10]
        path = fetch_questions(server.url("/q.yaml?token=x"), limits=LIMITS, on_event=events.append)
        assert fetch_questions(server.url("/q.yaml"), limits=LIMITS) == path
        server.files["/q.yaml"] = ServedFile(BODY.replace(b"now", b"then"), etag='"2"')
        other = fetch_questions(server.url("/q.yaml"), limits=LIMITS)
    assert path == own_cache / f"{hashlib.sha256(BODY).hexdigest()}.yaml"
    assert read_question_file(path)[0].paraphrases == ("What now?",)
    assert read_question_file(other)[0].paraphrases == ("What then?",)
    assert kept(own_cache) == sorted([path.name, other.name])
    last = events[-1]
    assert isinstance(last, Notice)
    assert "/q.yaml kept as" in last.text
    assert "token" not in last.text


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"<html>", DataError, "must be a list that is not empty, found str"),
        (b"- x", DataError, "entry 1 must be a mapping"),
        (b"#" * (MAX_BYTES + 1), DataError, "at most 1.0 MiB are taken"),
        (None, BackendError, "the server answers 404 Not Found; check the address, or give a file with --questions"),
    ],
)
def test_what_is_no_question_file_is_one_line_and_not_kept(
    own_cache: Path, body: bytes | None, kind: type[EmtoolError], message: str
) -> None:
    with (
        serve_files({} if body is None else {"/q": ServedFile(body)}) as server,
        pytest.raises(kind, match=message) as caught,
    ):
        fetch_questions(server.url("/q"), limits=LIMITS)
    assert "\n" not in str(caught.value)
    assert server.url("/q") in str(caught.value)
    assert kept(own_cache) == []


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot fetch from 'file:///etc/passwd'"):
        fetch_questions("file:///etc/passwd")
