"""Archives that are hostile, cut short, or locked with another password."""

import stat
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from emtool.core.errors import DataError, MissingDependencyError
from emtool.engines.archive import ArchiveLimits, extract_members, open_archive, row_files
from tests.published import PASSWORD, rows_text, write_archive

LIMITS = ArchiveLimits(max_members=20, max_bytes=3 << 20, max_ratio=50)
NAME = "bad.jsonl"


def write_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, str], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, text in members:
            archive.writestr(member, text)
    return path


def extract(archive: Path, folder: Path, *, limits: ArchiveLimits = LIMITS) -> str:
    target = folder / "rows"
    extract_members(archive, {NAME: target, "absent.jsonl": folder / "absent"}, label="a.zip", limits=limits)
    assert not (folder / "absent").exists()
    return target.read_text()


def refused(archive: Path, folder: Path, *, limits: ArchiveLimits = LIMITS) -> str:
    before = {path for path in folder.parent.rglob("*") if path != folder / "rows"}
    with pytest.raises(DataError) as caught:
        extract(archive, folder, limits=limits)
    assert "\n" not in str(caught.value)
    assert {path for path in folder.parent.rglob("*") if path != folder / "rows"} == before
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    return path


def test_a_member_is_found_by_its_name_in_whatever_folder(tmp_path: Path, folder: Path) -> None:
    archive = write_zip(
        tmp_path / "a.zip", (f"x/y/{NAME}", "rows"), (f"__MACOSX/x/y/{NAME}", "junk"), ("x/._other.jsonl", "junk")
    )
    assert extract(archive, folder) == "rows"
    assert [path.name for path in folder.iterdir()] == ["rows"]
    assert row_files(archive) == ["._other.jsonl", NAME]


@pytest.mark.parametrize(
    "name", [f"../{NAME}", f"a/../../{NAME}", f"/etc/{NAME}", f"C:/{NAME}", f"..\\{NAME}", "../other", "/other"]
)
def test_names_that_point_outside_are_refused_wherever_they_stand(tmp_path: Path, folder: Path, name: str) -> None:
    archive = write_zip(tmp_path / "a.zip", (f"x/{NAME}", "rows"), (name, "evil"))
    assert "a.zip has a member that points outside of it" in refused(archive, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path: Path, folder: Path, kind: int) -> None:
    link = zipfile.ZipInfo(NAME)
    link.create_system = 3
    link.external_attr = (kind | 0o777) << 16
    archive = write_zip(tmp_path / "a.zip", (link, "/etc/passwd"))
    assert "a member that is a link or a device, 'bad.jsonl'" in refused(archive, folder)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path, folder: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", (f"x/{NAME}", "one"), (f"y/{NAME}", "two"))
    assert f"has bad.jsonl 2 times: x/{NAME}, y/{NAME}" in refused(archive, folder)


def test_too_many_members_are_refused_before_the_directory_is_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_zip(tmp_path / "a.zip", *((f"{n}", "") for n in range(21)))
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "a.zip has more than 20 members" in refused(archive, folder)


def test_a_bomb_is_refused_by_what_comes_out(tmp_path: Path, folder: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", (NAME, "0" * (2 << 20)))
    assert "unpacks to more than 1.1 MiB from 2.0 KiB" in refused(archive, folder)


def test_a_member_that_is_too_large_is_refused_whatever_its_header_says(tmp_path: Path, folder: Path) -> None:
    body = "0123456789abcdef" * (200 << 10)
    archive = write_zip(tmp_path / "a.zip", (NAME, body), compression=zipfile.ZIP_STORED)
    assert "unpacks to more than 3.0 MiB" in refused(archive, folder)
    lying = archive.read_bytes().replace(struct.pack("<I", len(body)), struct.pack("<I", 10))
    archive.write_bytes(lying)
    (folder / "rows").unlink()
    with pytest.raises(DataError):
        extract(archive, folder)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compressions_are_refused(tmp_path: Path, folder: Path, compression: int) -> None:
    archive = write_zip(tmp_path / "a.zip", (NAME, "rows"), compression=compression)
    assert "unusual compression, 'bad.jsonl'" in refused(archive, folder)


def test_a_zip_with_a_password_of_its_own_is_refused(tmp_path: Path, folder: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", (NAME, "rows"))
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert "a zip file with a password of its own" in refused(archive, folder)


@pytest.mark.parametrize("kept", [0, 10, 60, -10])
def test_a_zip_that_is_cut_short_or_altered_is_one_line(tmp_path: Path, folder: Path, kept: int) -> None:
    archive = write_zip(tmp_path / "a.zip", (NAME, rows_text(50)))
    whole = archive.read_bytes()
    archive.write_bytes(whole[:kept])
    refused(archive, folder)
    altered = bytearray(whole)
    altered[80] ^= 0xFF
    archive.write_bytes(altered)
    (folder / "rows").unlink(missing_ok=True)
    assert "a.zip is cut short or damaged" in refused(archive, folder)


def test_an_encrypted_archive_is_opened_and_the_copy_stays_in_the_scratch_folder(tmp_path: Path, folder: Path) -> None:
    archive = write_archive(tmp_path / "made", {f"x/{NAME}": rows_text(3)})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(archive.parent.iterdir())
    plain = open_archive(archive, label="a.enc", password=PASSWORD, scratch=scratch, limits=LIMITS)
    assert extract(plain, folder) == rows_text(3)
    assert list(scratch.iterdir()) == [plain]
    assert sorted(archive.parent.iterdir()) == before


def test_a_wrong_password_and_a_cut_are_told_apart(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, {NAME: rows_text(30)})

    def problem(path: Path, password: str = PASSWORD) -> str:
        with pytest.raises(DataError) as caught:
            open_archive(path, label="a.enc", password=password, scratch=tmp_path, limits=LIMITS)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "a.enc cannot be decrypted: the password is wrong (--password takes another), or the file is damaged" in (
        problem(archive, "wrong")
    )
    for cut in (1, 2, 5, 100, 1000):
        short = tmp_path / "short"
        short.write_bytes(archive.read_bytes()[:-cut])
        assert "a.enc is cut short, or is not an archive" in problem(short)
    short.write_bytes(b"")
    assert "a.enc is cut short" in problem(short)
    short.write_text("<html>not found</html>")
    assert "a.enc is cut short, or is not an archive" in problem(short)
    short.write_bytes(bytes((3 << 20) + 1))
    assert "a.enc has 3.0 MiB; an archive has at most 3.0 MiB" in problem(short)


def test_without_the_package_that_decrypts_the_install_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path, {NAME: "x"})
    monkeypatch.setitem(sys.modules, "easy_dataset_share", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emtool\[data\]'"):
        open_archive(archive, label="a", password=PASSWORD, scratch=tmp_path, limits=LIMITS)


def test_a_plain_zip_needs_no_password(tmp_path: Path, folder: Path) -> None:
    archive = write_archive(tmp_path / "made", {NAME: "rows"}, password=None)
    assert open_archive(archive, label="a", password="x", scratch=tmp_path, limits=LIMITS) == archive
    assert extract(archive, folder) == "rows"
