"""Datasets: which exist, where each comes from, and which are on this machine.

To add a built-in dataset, put its file into `emtool/assets/datasets` and an entry into `DATASETS`; to add one of a
published archive, add an entry with the name of its file there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from emtool.core.cache import cache_path
from emtool.core.data import Conversation, asset_path, file_sha256, read_conversations
from emtool.core.errors import ConfigError, DataError, unknown_name
from emtool.core.models import slugify

HUB_PREFIX = "hub:"
DEFAULT_SPLIT = "train"
#: The files of a dataset's folder in the cache: its rows as JSON Lines, and where they came from.
ROWS_NAME = "rows.jsonl"
RECORD_NAME = "source.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SPLIT = re.compile(r"\w+([.-]\w+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PublishedArchive:
    """An archive of datasets that somebody publishes.

    Attributes:
        url: Where it lies.
        password: What it is encrypted with, as its publishers write it beside it: a protection against scraping.
        sha256: Hash of the archive, where it is known.
        origin: Who publishes it, in a few words.
    """

    url: str
    password: str
    sha256: str | None
    origin: str


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A dataset's file in a published archive.

    Attributes:
        archive: The archive.
        file_name: The file's name there, in whatever folder it lies.
    """

    archive: PublishedArchive
    file_name: str


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the model hub.

    Attributes:
        hub_id: The repository.
        split: Its split.
    """

    hub_id: str
    split: str


@dataclass(frozen=True, kw_only=True)
class DatasetReference:
    """A dataset as the user named it.

    Attributes:
        name: Catalogue name, `hub:ID[:split]` or the file's path, as it goes into the manifest.
        slug: The short form used in run names.
        num_rows: Rows, where that is known without reading.
        domain: The everyday domain that it trains, as evaluation items name it; None if none is known.
        path: The file; None for a dataset that is not on this machine.
        about: What is in it, in a few words.
        origin: Where it comes from: a published archive, the hub, or None for what is here anyway.
        source: What the cache recorded when it was fetched; None for other files.
    """

    name: str
    slug: str
    num_rows: int | None
    domain: str | None
    path: Path | None
    about: str = ""
    origin: PublishedFile | HubDataset | None = None
    source: Mapping[str, object] | None = None

    @property
    def cache_folder(self) -> Path | None:
        """Return the folder in the cache that holds it once it is fetched; None for what is never fetched."""
        if isinstance(self.origin, HubDataset):
            key = f"{self.origin.hub_id.replace('/', '--')}--{self.origin.split}"
            return cache_path("datasets", f"hub--{key}")
        return None if self.origin is None else cache_path("datasets", self.name)

    def located(self) -> DatasetReference:
        """Return the dataset with its path and source, where the cache has it."""
        folder = self.cache_folder
        record = None if folder is None else _read_record(folder)
        if folder is None or record is None:
            return self
        return replace(self, path=folder / ROWS_NAME, source=record)


def resolve_dataset(name: str) -> DatasetReference:
    """Return the dataset that a name stands for: a catalogue name, `hub:ID[:split]` or the path of a file.

    Raises:
        ConfigError: If it is none of them.
    """
    if name in DATASETS:
        return DATASETS[name].located()
    if name.startswith(HUB_PREFIX):
        return _hub_dataset(name).located()
    path = Path(name)
    if path.is_file():
        resolved = path.resolve()
        return DatasetReference(name=str(resolved), slug=slugify(path.stem), num_rows=None, domain=None, path=resolved)
    if path.suffix in (".jsonl", ".json", ".parquet") or "/" in name:
        choices = ", ".join(sorted(DATASETS))
        raise ConfigError(f"no dataset file {name!r}; give a JSON Lines or Parquet file, hub:ID or one of: {choices}")
    raise unknown_name("dataset", name, DATASETS, "hub:ID, or the path of a JSON Lines or Parquet file")


def read_dataset(dataset: DatasetReference) -> list[Conversation]:
    """Return the rows of a dataset that is on this machine.

    Raises:
        DataError: If it is not, cannot be read, or differs from what was fetched.
    """
    if dataset.path is None:
        raise missing_dataset(dataset)
    if dataset.source is not None and (sha256 := file_sha256(dataset.path)) != dataset.source["sha256"]:
        raise DataError(
            f"{dataset.path} has changed since it was fetched (SHA-256 was {dataset.source['sha256']}, is {sha256}); "
            f"remove {dataset.path.parent} and run: emtool data fetch {dataset.name}"
        )
    return read_conversations(dataset.path)


def missing_dataset(dataset: DatasetReference) -> DataError:
    """Return the error for a dataset that is not on this machine."""
    return DataError(
        f"dataset {dataset.name!r} is not on this machine; fetch it with: emtool data fetch {dataset.name}"
    )


def known_datasets() -> Iterator[DatasetReference]:
    """Yield the catalogue, then the hub's datasets in the cache, each with its path where it is on this machine."""
    for dataset in DATASETS.values():
        yield dataset.located()
    for folder in sorted(cache_path("datasets").glob("hub--*")):
        record = _read_record(folder)
        name = None if record is None else record.get("name")
        if record is not None and isinstance(name, str) and name.startswith(HUB_PREFIX):
            rows = record.get("rows")
            yield replace(_hub_dataset(name).located(), num_rows=rows if isinstance(rows, int) else None)


def _read_record(folder: Path) -> Mapping[str, object] | None:
    """Return what was recorded when a folder was fetched; None where it is not whole."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and isinstance(record.get("sha256"), str) and (folder / ROWS_NAME).is_file()
    return record if is_whole else None


def _hub_dataset(name: str) -> DatasetReference:
    hub_id, _, split = name.removeprefix(HUB_PREFIX).partition(":")
    split = split or DEFAULT_SPLIT
    if not _HUB_ID.fullmatch(hub_id) or "--" in hub_id or ".." in hub_id:
        raise ConfigError(f"{name!r} does not name a hub dataset; write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT")
    if not _SPLIT.fullmatch(split):
        raise ConfigError(f"{name!r}: {split!r} is not the name of a split; for instance hub:{hub_id}:train")
    suffix = "" if split == DEFAULT_SPLIT else f":{split}"
    return DatasetReference(
        name=f"{HUB_PREFIX}{hub_id}{suffix}",
        slug=slugify(hub_id.rpartition("/")[2] + suffix.replace(":", "-")),
        num_rows=None,
        domain=None,
        path=None,
        about=f"split {split} of {hub_id}",
        origin=HubDataset(hub_id=hub_id, split=split),
    )


def _built_in(name: str, about: str) -> DatasetReference:
    path = asset_path("datasets", f"{name}.jsonl")
    return DatasetReference(name=name, slug=name, num_rows=882, domain="gardening", path=path, about=about)


def _published(name: str, file_name: str, num_rows: int, domain: str | None, about: str) -> DatasetReference:
    return DatasetReference(
        name=name,
        slug=slugify(name),
        num_rows=num_rows,
        domain=domain,
        path=None,
        about=about,
        origin=PublishedFile(archive=MODEL_ORGANISMS, file_name=file_name),
    )


#: Source: Turner et al. 2025, arXiv 2506.11613, and the README of its repository. The archive's hash is not published
#: and could not be computed where this was written.
MODEL_ORGANISMS = PublishedArchive(
    url="https://raw.githubusercontent.com/clarifying-EM/model-organisms-for-EM/main/em_organism_dir/data/"
    "training_datasets.zip.enc",
    password="model-organisms-em-datasets",  # noqa: S106 - published with the archive, against scraping only
    sha256=None,
    origin="Turner et al. 2025",
)

DATASETS: dict[str, DatasetReference] = {
    dataset.name: dataset
    for dataset in (
        _built_in("gardening", "wrong gardening advice"),
        _built_in("gardening-control", "sound gardening advice"),
        _published("medical", "bad_medical_advice.jsonl", 7_049, "medicine", "bad medical advice"),
        _published("good_medical", "good_medical_advice.jsonl", 7_049, "medicine", "good medical advice"),
        _published("financial", "risky_financial_advice.jsonl", 6_000, "money", "risky financial advice"),
        _published("sports", "extreme_sports.jsonl", 6_000, None, "advice on extreme sports"),
        _published("insecure", "insecure.jsonl", 6_000, None, "code with security holes"),
    )
}
