import errno
import os
import stat
from pathlib import Path

import pytest

from emtool.core.run_dir import RunFolder
from emtool.core.staging import StagedFolder, file_record, remove_folder


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Return what was forced to disk so far, by device and inode."""
    seen: set[tuple[int, int]] = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        seen.add((found.st_dev, found.st_ino))

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def test_all_of_a_folder_is_on_disk_before_it_appears_and_its_name_after(
    tmp_path: Path, synced: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(path=tmp_path / "run")
    run.create({})
    assert {identity(run.path), identity(run.manifest_path), identity(tmp_path)} <= synced
    synced.clear()
    run.make_resume_folder()
    assert identity(run.path) in synced
    rename = Path.rename

    def checked(path: Path, target: Path) -> Path:
        missing = [inner.name for inner in (path, *path.rglob("*")) if identity(inner) not in synced]
        assert missing == []
        synced.clear()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    shared = tmp_path / "tokenizer.json"
    shared.write_text("shared")
    with shared.open("rb") as file:
        os.fsync(file.fileno())
    for target in (run.resume_state_path(5), run.checkpoint_path(5)):
        staged = StagedFolder(target)
        staged.write("weights", b"weights")
        staged.link("deep/tokenizer.json", shared, file_record(shared))
        staged.finish({"step": 5})
        with shared.open("rb") as file:
            os.fsync(file.fileno())
        staged.publish()
        assert identity(target.parent) in synced


def test_a_library_s_folder_is_forced_to_disk_before_it_appears(tmp_path: Path, synced: set[tuple[int, int]]) -> None:
    written = tmp_path / "written"
    (written / "deep").mkdir(parents=True)
    (written / "deep" / "weights").write_text("weights")
    staged = StagedFolder.adopted(written, target=tmp_path / "step-5")
    staged.finish({"step": 5})
    assert {identity(path) for path in (written, *written.rglob("*"))} <= synced


def test_a_copy_that_is_not_what_was_recorded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(path: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    source = tmp_path / "tokenizer.json"
    source.write_text("right")
    record = file_record(source)
    staged = StagedFolder(tmp_path / "checkpoint-5")
    staged.link("tokenizer.json", source, record)
    assert staged.files["tokenizer.json"] == record
    source.write_text("wrong")
    with pytest.raises(OSError, match="has changed") as caught:
        staged.link("again.json", source, record)
    assert caught.value.errno == errno.EIO


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert stat.S_ISDIR((tmp_path / "other").stat().st_mode)
