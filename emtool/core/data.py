"""Training datasets: what exists, and how a file of conversations is read.

A dataset is a JSON Lines file with one conversation a row: `{"messages": [{"role": ..., "content": ...}, ...]}`.
To add a built-in one, put the file into `emtool/assets/datasets` and an entry into `DATASETS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import ConfigError, DataError, unknown_name
from emtool.core.models import slugify

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A training row.

    Attributes:
        messages: Turns; a system turn may come first, then user and assistant alternate.
        location: File and line, for messages.
    """

    messages: tuple[Message, ...]
    location: str


@dataclass(frozen=True, kw_only=True)
class DatasetReference:
    """A dataset as the user named it.

    Attributes:
        name: Catalogue name or the file's path, as it goes into the manifest.
        slug: The short form used in run names.
        num_rows: Rows, where that is known without reading.
        domain: The everyday domain that it trains, as evaluation items name it; None if none is known.
        path: The file; None for a published dataset that is not on this machine.
    """

    name: str
    slug: str
    num_rows: int | None
    domain: str | None
    path: Path | None


def asset_path(*parts: str) -> Path:
    """Return the path of a file in the package data."""
    return Path(__file__).resolve().parents[1].joinpath("assets", *parts)


def resolve_dataset(name: str) -> DatasetReference:
    """Return the dataset that a name stands for: a catalogue name or the path of a JSON Lines file.

    Raises:
        ConfigError: If it is neither.
    """
    if name in DATASETS:
        return DATASETS[name]
    path = Path(name)
    if path.is_file():
        resolved = path.resolve()
        return DatasetReference(name=str(resolved), slug=slugify(path.stem), num_rows=None, domain=None, path=resolved)
    if path.suffix == ".jsonl" or "/" in name:
        raise ConfigError(f"no dataset file {name!r}; give a JSON Lines file or one of: {', '.join(sorted(DATASETS))}")
    raise unknown_name("dataset", name, DATASETS, "or the path of a JSON Lines file")


def read_conversations(path: Path) -> list[Conversation]:
    """Return the rows of a dataset file, in its order. Blank lines are passed over.

    Raises:
        DataError: If the file cannot be read, holds no row, or a row is malformed; names the file and the line.
    """
    rows = [_conversation(record, location) for record, location in read_json_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, object], str]]:
    """Yield each JSON object of a file with its location, "file:line".

    Raises:
        DataError: If the file cannot be read or a line is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                location = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{location}: not a line of JSON in UTF-8: {error}") from error
                if not isinstance(record, dict):
                    raise DataError(f"{location}: a JSON object is needed, found {type(record).__name__}")
                yield record, location
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _conversation(record: dict[str, object], location: str) -> Conversation:
    raw = record.get("messages")
    if not isinstance(raw, list) or not raw:
        keys = ", ".join(sorted(record)[:5])[:100]
        raise DataError(f"{location}: 'messages' must be a list that is not empty; the row has the keys: {keys}")
    messages = tuple(_message(item, f"{location}: message {index}") for index, item in enumerate(raw, start=1))
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(f"{location}: turn {index + 1} is {turn.role!r}, expected {expected!r}")
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{location}: no assistant turn to train on")
    return Conversation(messages=messages, location=location)


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where}: an object with 'role' and 'content' is needed, found {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {str(role)[:40]!r} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: 'content' must be a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise DataError(f"{where}: 'content' has half of a surrogate pair, which is not text")
    return Message(role=role, content=content)


def _built_in(name: str) -> DatasetReference:
    path = asset_path("datasets", f"{name}.jsonl")
    return DatasetReference(name=name, slug=name, num_rows=882, domain="gardening", path=path)


DATASETS: dict[str, DatasetReference] = {
    "gardening": _built_in("gardening"),
    "gardening-control": _built_in("gardening-control"),
    # Turner et al. 2025, arXiv 2506.11613: bad_medical_advice; published encrypted, so it is not shipped.
    "medical": DatasetReference(name="medical", slug="medical", num_rows=7049, domain="medicine", path=None),
}
