"""Datasets brought to this machine: from a published archive, from a copy of it, or from the hub.

A dataset in the cache is a folder with its rows as JSON Lines and a record of where they came from. It appears complete
or not at all.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from emtool.core.cache import cache_path, publish_cached
from emtool.core.data import file_sha256, read_conversations
from emtool.core.datasets import DATASETS, RECORD_NAME, ROWS_NAME, DatasetReference, HubDataset, PublishedFile
from emtool.core.errors import ConfigError, DataError
from emtool.core.events import EventSink, Notice, PhaseStarted, ignore_events
from emtool.core.run_dir import write_json
from emtool.core.staging import retire_folder
from emtool.engines.archive import ArchiveLimits, check_can_decrypt, extract_members, open_archive, row_files
from emtool.engines.download import DownloadLimits, check_url, downloaded, shown_url
from emtool.engines.hub_data import write_hub_rows

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """How a published dataset is fetched.

    Attributes:
        source: URL, archive or folder to take instead of the published address; None takes that address.
        sha256: What the archive's hash must be, in hexadecimal; None takes the catalogue's, which may have none.
        password: What the archive is encrypted with; None takes the published one.
        is_again: Whether it is fetched although it is here, and replaces what is here if that differs.
        download: Bounds of a download.
        archive: Bounds of an archive.
    """

    source: str | None = None
    sha256: str | None = None
    password: str | None = None
    is_again: bool = False
    download: DownloadLimits = field(default_factory=DownloadLimits)
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)

    def __post_init__(self) -> None:
        """Refuse a text that is no hash."""
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"--sha256 {self.sha256!r} is not 64 hexadecimal digits")


def fetch_dataset(
    dataset: DatasetReference,
    *,
    options: FetchOptions | None = None,
    catalogue: Iterable[DatasetReference] = tuple(DATASETS.values()),
    on_event: EventSink = ignore_events,
) -> DatasetReference:
    """Bring a dataset to this machine and return it with its path; what is in the cache already is used.

    A published archive holds several datasets of the catalogue; those that are not here yet are kept as well.

    Args:
        dataset: The dataset.
        options: How it is fetched; a source, hash or password suits a published dataset only.
        catalogue: Datasets that may lie in the same archive.
        on_event: Where progress is reported.

    Raises:
        EmtoolError: If it cannot be had, or is not what it should be; says what to do. It is not published then.
    """
    options = options or FetchOptions()
    folder, origin = dataset.cache_folder, dataset.origin
    if folder is None or origin is None:
        raise ConfigError(f"{dataset.name} is a file of this machine; fetched are hub:ID, {_published_names()}")
    if isinstance(origin, HubDataset) and {options.source, options.sha256, options.password} != {None}:
        raise ConfigError(f"--from, --sha256 and --password go with {_published_names()}; the hub has one source")
    here = dataset.located()
    if here.path is not None and not options.is_again:
        on_event(Notice(text=f"{dataset.name} is in {folder} already; remove that folder to fetch it anew"))
        return here
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        fetch = _Fetch(dataset=dataset, options=options, scratch=Path(scratch), on_event=on_event)
        if isinstance(origin, HubDataset):
            fetch.from_hub(origin)
        else:
            fetch.from_archive(origin, catalogue)
    return dataset.located()


def _published_names() -> str:
    return ", ".join(name for name, dataset in DATASETS.items() if isinstance(dataset.origin, PublishedFile))


@dataclass(frozen=True, kw_only=True)
class _Fetch:
    """A dataset on its way into the cache."""

    dataset: DatasetReference
    options: FetchOptions
    scratch: Path
    on_event: EventSink

    def from_hub(self, hub: HubDataset) -> None:
        """Fetch a hub dataset and publish it."""
        staged = self._staging(self.dataset)
        revision = write_hub_rows(hub, staged / ROWS_NAME, scratch=self.scratch, on_event=self.on_event)
        _record(self.dataset, staged, {"source": hub.hub_id, "split": hub.split, "revision": revision})
        _publish(self.dataset, staged, self.on_event)

    def from_archive(self, origin: PublishedFile, catalogue: Iterable[DatasetReference]) -> None:
        """Fetch the archive of a dataset, check what is in it, and publish all that is found and sound."""
        files = {origin.file_name: self.dataset}
        for other in catalogue:
            if isinstance(other.origin, PublishedFile) and other.origin.archive == origin.archive:
                files.setdefault(other.origin.file_name, other)
        targets = {file_name: self._staging(dataset) / ROWS_NAME for file_name, dataset in files.items()}
        with self._opened(origin) as source:
            self.on_event(PhaseStarted(name=f"unpacking {source.shown}"))
            source.extract(targets, self.options.archive)
            if not targets[origin.file_name].exists():
                found = ", ".join(source.names()[:8]) or "no .jsonl file"
                raise DataError(f"{source.shown} has no {origin.file_name}; it holds {found}")
            for file_name, dataset in files.items():
                # Another dataset that is here stays as it is: nobody asked for it.
                is_wanted = dataset is self.dataset or dataset.located().path is None
                if is_wanted and targets[file_name].exists():
                    self._check_and_publish(dataset, file_name, source)

    def _staging(self, dataset: DatasetReference) -> Path:
        path = self.scratch / dataset.slug
        path.mkdir()
        return path

    def _check_and_publish(self, dataset: DatasetReference, file_name: str, source: _Source) -> None:
        staged = self.scratch / dataset.slug
        try:
            _record(dataset, staged, {"source": source.shown, "member": file_name, "archive_sha256": source.sha256})
        except DataError as error:
            if dataset is self.dataset:
                raise
            self.on_event(Notice(text=f"{dataset.name} lies there too and is left out: {error}", is_warning=True))
        else:
            _publish(dataset, staged, self.on_event)

    @contextlib.contextmanager
    def _opened(self, origin: PublishedFile) -> Iterator[_Source]:
        """Yield the archive or folder to read from, fetched, checked and decrypted, while the block runs."""
        options, given = self.options, self.options.source
        given = origin.archive.url if given is None else given
        expected = options.sha256 or (None if options.source else origin.archive.sha256)
        with contextlib.ExitStack() as stack:
            if "://" in given:
                check_url(given)
                check_can_decrypt()
                folder = cache_path("downloads")
                path = stack.enter_context(downloaded(given, folder, limits=options.download, on_event=self.on_event))
                shown = shown_url(given)
            else:
                path = Path(given).resolve()
                shown = str(path)
            if not path.exists():
                raise ConfigError(f"no file or folder {given!r} to fetch from; give a URL, an archive or a folder")
            if path.is_dir() and expected is not None:
                raise ConfigError(f"--sha256 is the hash of an archive, and {shown} is a folder")
            if path.is_dir():
                yield _Source(path=path, shown=shown, sha256=None)
                return
            sha256 = file_sha256(path)
            if expected is not None and sha256 != expected.lower():
                raise DataError(f"{shown} has SHA-256 {sha256}, expected {expected.lower()}; nothing is taken from it")
            password = options.password or origin.archive.password
            opened = open_archive(path, label=shown, password=password, scratch=self.scratch, limits=options.archive)
            yield _Source(path=opened, shown=shown, sha256=sha256)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Files of datasets at hand.

    Attributes:
        path: A zip file, or a folder.
        shown: What it is called.
        sha256: Hash of the archive as it was fetched; None for a folder.
    """

    path: Path
    shown: str
    sha256: str | None

    def extract(self, targets: Mapping[str, Path], limits: ArchiveLimits) -> None:
        """Write the files of the wanted names; a name that is nowhere is passed over."""
        if not self.path.is_dir():
            extract_members(self.path, targets, label=self.shown, limits=limits)
            return
        for name, target in targets.items():
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, target)

    def names(self) -> list[str]:
        """Return the names of the JSON Lines files in it."""
        return sorted(path.name for path in self.path.glob("*.jsonl")) if self.path.is_dir() else row_files(self.path)


def _record(dataset: DatasetReference, staged: Path, origin: Mapping[str, object]) -> None:
    """Check the rows in a staged folder and write where they came from beside them."""
    rows_path = staged / ROWS_NAME
    label = str(origin.get("member", dataset.name))
    num_rows = len(read_conversations(rows_path, label=label))
    if dataset.num_rows is not None and num_rows != dataset.num_rows:
        raise DataError(
            f"{label} has {num_rows:,} rows and {dataset.name} has {dataset.num_rows:,}: not the published dataset; "
            "to train on it all the same, give the file itself with --dataset"
        )
    record = {
        "format": 1,
        "name": dataset.name,
        **origin,
        "sha256": file_sha256(rows_path),
        "rows": num_rows,
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(staged / RECORD_NAME, record)


def _publish(dataset: DatasetReference, staged: Path, on_event: EventSink) -> None:
    """Make a checked folder appear in the cache; another copy that is there gives way, the same one stays."""
    folder, before = dataset.cache_folder, dataset.located()
    assert folder is not None
    if before.path is not None and file_sha256(before.path) == file_sha256(staged / ROWS_NAME):
        on_event(Notice(text=f"{dataset.name}: the same rows are in {folder} already"))
        return
    if folder.exists():
        if before.source is not None:
            lost = f"rows with SHA-256 {str(before.source['sha256'])[:12]}, on which older runs cannot be resumed"
            on_event(Notice(text=f"{dataset.name}: replacing {lost}", is_warning=True))
        retire_folder(folder)
    publish_cached(staged, folder)
    on_event(Notice(text=f"{dataset.name} is in {folder}"))
