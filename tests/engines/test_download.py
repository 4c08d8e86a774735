"""Downloads from a real server that is slow, cuts off, changes and refuses."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from emtool.core.errors import BackendError, ConfigError, DataError, EmtoolError
from emtool.core.events import Event, Notice, StepFinished
from emtool.engines.download import DownloadLimits, downloaded, may_redirect, shown_url
from emtool.engines.partial_file import PartialFile
from tests.file_server import FileServer, ServedFile, serve_files

BODY = random.Random(1).randbytes(700_001)
LIMITS = DownloadLimits(connect_seconds=2, read_seconds=0.3, waits=(0.0, 0.0), max_bytes=1_000_000)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_files({"/a.enc": ServedFile(BODY)}) as served:
        yield served


def fetch(server: FileServer, folder: Path, *, limits: DownloadLimits = LIMITS) -> tuple[bytes, list[Event]]:
    events: list[Event] = []
    with downloaded(server.url("/a.enc"), folder, limits=limits, on_event=events.append) as path:
        body = path.read_bytes()
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]
    return body, events


def fails(server: FileServer, folder: Path, kind: type[EmtoolError] = BackendError) -> str:
    with pytest.raises(kind) as caught:
        fetch(server, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_comes_whole_with_progress_and_is_removed_afterwards(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].faults = ["slow"]
    body, events = fetch(server, tmp_path)
    assert body == BODY
    steps = [event.step for event in events if isinstance(event, StepFinished)]
    assert steps == sorted(steps)
    assert steps[-1] == len(BODY)
    assert "Range" not in server.requests[0]


@pytest.mark.parametrize("fault", [400_000, "hang"])
def test_a_download_that_is_cut_off_goes_on_where_it_stopped(
    server: FileServer, tmp_path: Path, fault: int | str
) -> None:
    server.files["/a.enc"].faults = [fault]
    body, events = fetch(server, tmp_path)
    assert body == BODY
    assert len(server.requests) == 2
    start = int(server.requests[1]["Range"].removeprefix("bytes=").rstrip("-"))
    assert 200_000 < start < len(BODY)
    assert server.requests[1]["If-Range"] == '"1"'
    assert any("trying again" in event.text for event in events if isinstance(event, Notice))


def test_what_came_is_kept_for_the_next_call_when_the_attempts_are_used_up(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].faults = [200_000, 200_000, 200_000]
    message = fails(server, tmp_path)
    assert "the connection was cut off after" in message
    assert f"are kept in {tmp_path}" in message
    assert "the same command goes on from there, or give a local copy with --from" in message
    kept = next(tmp_path.glob("*.part")).stat().st_size
    assert kept > 400_000
    body, _ = fetch(server, tmp_path)
    assert body == BODY
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_a_file_that_has_changed_begins_anew(server: FileServer, tmp_path: Path) -> None:
    file = server.files["/a.enc"]
    file.faults = [200_000] * 3
    fails(server, tmp_path)
    file.body, file.etag = b"other" * 100_000, '"2"'
    body, events = fetch(server, tmp_path)
    assert body == file.body
    assert any("begins anew" in event.text for event in events if isinstance(event, Notice))


def test_a_file_that_has_become_shorter_begins_anew(server: FileServer, tmp_path: Path) -> None:
    file = server.files["/a.enc"]
    file.faults = [300_000, 100_000, 100_000]
    fails(server, tmp_path)
    file.body = b"short" * 100
    assert fetch(server, tmp_path)[0] == file.body


def test_a_server_without_parts_begins_anew(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].has_ranges = False
    server.files["/a.enc"].faults = [400_000]
    assert fetch(server, tmp_path)[0] == BODY


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_name_for_the_content_nothing_is_kept(server: FileServer, tmp_path: Path, etag: str | None) -> None:
    server.files["/a.enc"].etag = etag
    server.files["/a.enc"].faults = [400_000] * 3
    assert "nothing is kept; try again later" in fails(server, tmp_path)
    assert all("Range" not in request for request in server.requests)
    assert not list(tmp_path.glob("*.part*"))


def test_another_part_than_was_asked_for_is_not_used(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].faults = [400_000, "wrong part"]
    assert fetch(server, tmp_path)[0] == BODY
    assert "Range" not in server.requests[2]


def test_a_passing_failure_is_tried_again_and_a_lasting_one_named(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].faults = ["500", "reset"]
    assert fetch(server, tmp_path)[0] == BODY
    server.files["/a.enc"].faults = ["503"] * 3
    assert "the server answers 503 Service Unavailable; nothing is kept" in fails(server, tmp_path)
    server.requests.clear()
    server.files["/a.enc"].faults = ["404"]
    message = fails(server, tmp_path)
    assert "a.enc: the server answers 404 Not Found; check the address, or give a local copy with --from" in message
    assert len(server.requests) == 1


def test_a_server_that_says_nothing_is_away(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        silent = FileServer(address=f"http://127.0.0.1:{listening.getsockname()[1]}", files={})
        assert "127.0.0.1 does not answer; nothing is kept" in fails(silent, tmp_path)
    assert "127.0.0.1 cannot be reached: connection refused" in fails(silent, tmp_path)


def test_a_file_that_is_too_large_is_refused_by_what_is_said_and_by_what_comes(
    server: FileServer, tmp_path: Path
) -> None:
    server.files["/a.enc"].body = bytes(1_000_001)
    assert "serves 976.6 KiB or more, and at most 976.6 KiB are taken" in fails(server, tmp_path, DataError)
    server.files["/a.enc"].has_length = False
    assert "this is not the file that is meant" in fails(server, tmp_path, DataError)
    assert not list(tmp_path.glob("*.part*"))


def test_redirects_are_followed_a_few_times_and_to_no_other_scheme(server: FileServer, tmp_path: Path) -> None:
    server.files["/a.enc"].faults = ["to /a.enc", f"to {server.url('/a.enc')}"]
    assert fetch(server, tmp_path)[0] == BODY
    server.files["/a.enc"].faults = ["to /a.enc"] * 6
    assert "more than 5 redirects" in fails(server, tmp_path)
    server.files["/a.enc"].faults = ["to ftp://127.0.0.1/a.enc"]
    assert "it redirects to ftp://127.0.0.1/a.enc, which is less safe and not followed" in fails(server, tmp_path)


def test_a_redirect_never_leaves_encryption() -> None:
    assert may_redirect("http://a/x", "https://b/x")
    assert may_redirect("https://a/x", "https://b/x")
    assert not may_redirect("https://a/x", "http://a/x")
    assert not may_redirect("http://a/x", "file:///x")


@pytest.mark.parametrize("url", ["ftp://x/a", "file:///etc/passwd", "http://", "http://x:99999/", "http://[::1/"])
def test_other_addresses_are_refused(url: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="give an http or https address, a file or a folder"),
        downloaded(url, tmp_path, limits=LIMITS, on_event=lambda event: None),
    ):
        pass


def test_secrets_in_an_address_are_not_shown() -> None:
    assert shown_url("https://me:secret@example.org:8080/a.enc?token=x#y") == "https://example.org:8080/a.enc"
    with (
        pytest.raises(ConfigError, match=r"the address https://example\.org/a holds a user name or password"),
        downloaded("https://me:secret@example.org/a", Path(), limits=LIMITS, on_event=lambda event: None),
    ):
        pass


def test_two_processes_do_not_write_the_same_file(server: FileServer, tmp_path: Path) -> None:
    with (
        downloaded(server.url("/a.enc"), tmp_path, limits=LIMITS, on_event=lambda event: None) as path,
        pytest.raises(BackendError, match="another process is downloading this file"),
        PartialFile(path=path).held(),
    ):
        pass
