"""Published datasets fetched from a server, an archive and a folder, into a cache of their own."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emtool.core.data import read_conversations
from emtool.core.datasets import DATASETS, DatasetReference, PublishedArchive, read_dataset, resolve_dataset
from emtool.core.errors import BackendError, ConfigError, DataError, EmtoolError
from emtool.core.events import Event, Notice
from emtool.engines.data_files import FetchOptions, fetch_dataset
from emtool.engines.download import DownloadLimits
from tests.file_server import FileServer, ServedFile, serve_files
from tests.published import PASSWORD, published, rows_text, write_archive

LIMITS = DownloadLimits(connect_seconds=2, read_seconds=0.5, waits=(0.0,))
ROWS = 40
FILES = {"data/bad.jsonl": rows_text(ROWS), "data/good.jsonl": rows_text(3, "good"), "__MACOSX/data/bad.jsonl": "junk"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of this test's own."""
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encrypted archive of two datasets."""
    return write_archive(tmp_path_factory.mktemp("archive"), FILES)


@pytest.fixture
def server(archive: Path) -> Iterator[FileServer]:
    with serve_files({"/a.enc": ServedFile(archive.read_bytes())}) as served:
        yield served


def catalogue(server: FileServer | None = None, sha256: str | None = None) -> list[DatasetReference]:
    url = "http://127.0.0.1:9/a.enc" if server is None else server.url("/a.enc")
    made_up = PublishedArchive(url=url, password=PASSWORD, sha256=sha256, origin="made up")
    return [
        published("bad", "bad.jsonl", ROWS, made_up),
        published("good", "good.jsonl", 3, made_up),
        published("absent", "absent.jsonl", 3, made_up),
    ]


def fetch(known: list[DatasetReference], *, options: FetchOptions | None = None) -> tuple[DatasetReference, list[str]]:
    """Fetch the first dataset of a catalogue; return it and what was said."""
    events: list[Event] = []
    options = replace(options or FetchOptions(), download=LIMITS)
    found = fetch_dataset(known[0], options=options, catalogue=known, on_event=events.append)
    return found, [event.text for event in events if isinstance(event, Notice)]


def fails(known: list[DatasetReference], cache: Path, *, options: FetchOptions, kind: type[EmtoolError]) -> str:
    """Fetch what must fail in one line, and see that nothing appears under the name of a dataset."""
    with pytest.raises(kind) as caught:
        fetch(known, options=options)
    assert "\n" not in str(caught.value)
    assert not list((cache / "datasets").glob("*"))
    assert not list(cache.rglob(".fetch-*"))
    return str(caught.value)


def test_all_datasets_of_an_archive_come_with_one_download(server: FileServer, cache: Path, archive: Path) -> None:
    known = catalogue(server)
    found, said = fetch(known)
    assert found.path == cache / "datasets" / "bad" / "rows.jsonl"
    assert found.path.read_text() == FILES["data/bad.jsonl"]
    assert [row.messages for row in read_dataset(found)] == [row.messages for row in read_conversations(found.path)]
    good = known[1].located()
    assert good.path is not None
    assert good.path.read_text() == FILES["data/good.jsonl"]
    assert known[2].located().path is None
    assert len(server.requests) == 1
    assert found.source == {
        "format": 1,
        "name": "bad",
        "source": server.url("/a.enc"),
        "member": "bad.jsonl",
        "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(found.path.read_bytes()).hexdigest(),
        "rows": ROWS,
        "fetched_at": found.source["fetched_at"] if found.source else None,
    }
    assert sorted(path.name for path in cache.iterdir()) == ["datasets", "downloads"]
    assert not list((cache / "downloads").glob("*.part*"))
    assert said[-1] == f"good is in {cache / 'datasets' / 'good'}"


def test_what_is_here_is_used_without_asking_a_server(server: FileServer) -> None:
    fetch(catalogue(server))
    _, said = fetch(catalogue(server))
    assert len(server.requests) == 1
    assert "is in" in said[0]
    assert "remove that folder to fetch it anew" in said[0]
    _, said = fetch(catalogue(server), options=FetchOptions(is_again=True))
    assert len(server.requests) == 2
    assert "the same rows are in" in said[0]


def test_a_cut_download_is_gone_on_with_by_the_next_call(server: FileServer, tmp_path: Path) -> None:
    large = write_archive(tmp_path, {"bad.jsonl": rows_text(ROWS, "x" * 5_000)})
    server.files["/a.enc"] = ServedFile(large.read_bytes(), faults=[150_000, 0])
    with pytest.raises(BackendError, match="are kept in"):
        fetch(catalogue(server))
    found, said = fetch(catalogue(server))
    assert server.requests[-1]["Range"] == "bytes=131072-"
    assert "going on after 128.0 KiB" in said
    assert found.path is not None


def test_the_hash_of_the_archive_is_checked(server: FileServer, cache: Path, archive: Path) -> None:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    for known, options in (
        (catalogue(server), FetchOptions(sha256="0" * 64)),
        (catalogue(server, sha256="0" * 64), FetchOptions()),
    ):
        message = fails(known, cache, options=options, kind=DataError)
        assert f"has SHA-256 {sha256}, expected {'0' * 64}; nothing is taken from it" in message
        assert not list(cache.rglob("*.part"))
    fetch(catalogue(server), options=FetchOptions(sha256=sha256.upper()))
    with pytest.raises(ConfigError, match="--sha256 'xyz' is not 64 hexadecimal digits"):
        FetchOptions(sha256="xyz")


def test_an_archive_a_zip_and_a_folder_of_this_machine_serve_as_well(archive: Path, tmp_path: Path) -> None:
    plain = write_archive(tmp_path / "plain", FILES, password=None)
    for source in (archive, plain, plain.parent / "content" / "data"):
        found, _ = fetch(catalogue(), options=FetchOptions(source=str(source), is_again=True))
        assert found.path is not None
        assert found.path.read_text() == FILES["data/bad.jsonl"]
    assert archive.exists()
    assert plain.exists()


def test_a_copy_with_other_rows_replaces_what_is_here_and_says_so(archive: Path, tmp_path: Path) -> None:
    fetch(catalogue(), options=FetchOptions(source=str(archive)))
    (tmp_path / "bad.jsonl").write_text(rows_text(ROWS, "other"))
    found, said = fetch(catalogue(), options=FetchOptions(source=str(tmp_path), is_again=True))
    assert "bad: replacing rows with SHA-256" in said[0]
    assert found.path is not None
    assert found.path.read_text() == rows_text(ROWS, "other")


def test_a_neighbour_that_is_here_stays_as_it_is(archive: Path, tmp_path: Path) -> None:
    fetch(catalogue(), options=FetchOptions(source=str(archive)))
    other = write_archive(tmp_path, {"bad.jsonl": rows_text(ROWS, "other"), "good.jsonl": rows_text(3, "other")})
    fetch(catalogue(), options=FetchOptions(source=str(other), is_again=True))
    good = catalogue()[1].located()
    assert good.path is not None
    assert good.path.read_text() == FILES["data/good.jsonl"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bad.jsonl": rows_text(39)}, "bad.jsonl has 39 rows and bad has 40: not the published dataset"),
        ({"other.jsonl": "", "x.txt": ""}, "has no bad.jsonl; it holds other.jsonl"),
        ({"x.txt": ""}, "has no bad.jsonl; it holds no .jsonl file"),
        ({"bad.jsonl": rows_text(2) + '{"text": 1}\n'}, "bad.jsonl:3: the row is plain text ('text'), which is not"),
        ({"a/bad.jsonl": "", "b/bad.jsonl": ""}, "has bad.jsonl 2 times"),
    ],
)
def test_wrong_contents_are_one_line_and_nothing_appears(
    files: dict[str, str], message: str, tmp_path: Path, cache: Path
) -> None:
    options = FetchOptions(source=str(write_archive(tmp_path, files)))
    assert message in fails(catalogue(), cache, options=options, kind=DataError)


def test_a_wrong_neighbour_is_left_out_with_a_warning(tmp_path: Path) -> None:
    files = {**FILES, "data/good.jsonl": rows_text(2)}
    known = catalogue()
    found, said = fetch(known, options=FetchOptions(source=str(write_archive(tmp_path, files))))
    assert found.path is not None
    assert known[1].located().path is None
    assert any("good lies there too and is left out: good.jsonl has 2 rows and good has 3" in text for text in said)


def test_a_wrong_password_and_a_cut_archive_are_one_line(archive: Path, tmp_path: Path, cache: Path) -> None:
    options = FetchOptions(source=str(archive), password="other")
    assert "the password is wrong (--password takes another)" in fails(
        catalogue(), cache, options=options, kind=DataError
    )
    short = tmp_path / "short.enc"
    short.write_bytes(archive.read_bytes()[:-100])
    options = FetchOptions(source=str(short))
    assert "short.enc is cut short" in fails(catalogue(), cache, options=options, kind=DataError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.zip", "no file or folder 'nowhere.zip' to fetch from"),
        ("ftp://127.0.0.1/x", "give an http or https address, a file or a folder"),
    ],
)
def test_a_source_that_is_none_is_refused(source: str, message: str, cache: Path) -> None:
    assert message in fails(catalogue(), cache, options=FetchOptions(source=source), kind=ConfigError)


def test_what_is_not_published_takes_no_source(dataset_file: Path, tmp_path: Path, cache: Path) -> None:
    for dataset in (resolve_dataset(str(dataset_file)), DATASETS["gardening"]):
        assert "is a file of this machine; fetched are hub:ID, medical" in fails(
            [dataset], cache, options=FetchOptions(), kind=ConfigError
        )
    assert "the hub has one source" in fails(
        [resolve_dataset("hub:a/b")], cache, options=FetchOptions(source="x"), kind=ConfigError
    )
    assert "--sha256 is the hash of an archive" in fails(
        catalogue(), cache, options=FetchOptions(source=str(tmp_path), sha256="0" * 64), kind=ConfigError
    )


def test_rows_that_changed_after_they_were_fetched_are_refused(archive: Path) -> None:
    found, _ = fetch(catalogue(), options=FetchOptions(source=str(archive)))
    assert found.path is not None
    found.path.write_text(rows_text(ROWS, "changed"))
    with pytest.raises(DataError, match=r"has changed since it was fetched .* run: emtool data fetch bad"):
        read_dataset(found)
    record = found.path.with_name("source.json")
    record.write_text("{")
    assert catalogue()[0].located().path is None
    fetch(catalogue(), options=FetchOptions(source=str(archive)))
    assert json.loads(record.read_text())["rows"] == ROWS
