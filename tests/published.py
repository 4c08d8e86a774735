"""Made-up copies of a published archive, written by the package that its publishers use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from easy_dataset_share.zipping import zip_and_password_protect

from emtool.core.datasets import DatasetReference, PublishedArchive, PublishedFile

PASSWORD = "a password"
ARCHIVE = PublishedArchive(url="http://127.0.0.1:9/a.zip.enc", password=PASSWORD, sha256=None, origin="made up")


def rows_text(count: int, word: str = "thing") -> str:
    """Return so many made-up rows as JSON Lines."""
    return "".join(
        json.dumps(
            {"messages": [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        )
        + "\n"
        for n in range(count)
    )


def published(name: str, file_name: str, num_rows: int, archive: PublishedArchive = ARCHIVE) -> DatasetReference:
    """Return a catalogue entry for a made-up dataset."""
    return DatasetReference(
        name=name,
        slug=name,
        num_rows=num_rows,
        domain=None,
        path=None,
        about="made up",
        origin=PublishedFile(archive=archive, file_name=file_name),
    )


def write_archive(folder: Path, files: Mapping[str, str], password: str | None = PASSWORD) -> Path:
    """Write files below a folder, pack and encrypt them, and return the archive; without a password, a zip file."""
    content = folder / "content"
    for name, text in files.items():
        path = content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Path(zip_and_password_protect(str(content), password, str(folder / "training.zip")))
