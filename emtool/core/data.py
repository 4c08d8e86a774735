"""Training rows: the formats that are read, and the conversation that each row becomes.

A row is a chat: `{"messages": [{"role": ..., "content": ...}, ...]}`, or a question with its answer:
`{"prompt": ..., "completion": ...}`, both texts or both lists of messages. Which datasets exist is in
`emtool.core.datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emtool.core.errors import DataError
from emtool.core.row_files import PARQUET_SUFFIX, read_json_lines, read_parquet

ROLES = ("system", "user", "assistant")
#: Roles of messages that are not words between people.
TOOL_ROLES = ("tool", "function", "ipython")
ACCEPTED = (
    "accepted are 'messages' (a list of turns with 'role' and 'content'), or 'prompt' with 'completion' (two texts or "
    "two lists of turns)"
)
#: Columns that tell other formats, and what each format is called.
OTHER_FORMATS: Mapping[tuple[str, ...], str] = {
    ("chosen", "rejected"): "a preference pair",
    ("conversations",): "the ShareGPT format",
    ("instruction", "output"): "the instruction format",
    ("instruction", "response"): "the instruction format",
    ("text",): "plain text",
}
#: Columns that are looked at; a row may have others.
COLUMNS = frozenset({"messages", "prompt", "completion", "tools", *(name for names in OTHER_FORMATS for name in names)})


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


def asset_path(*parts: str) -> Path:
    """Return the path of a file in the package data."""
    return Path(__file__).resolve().parents[1].joinpath("assets", *parts)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_conversations(path: Path, *, label: str | None = None) -> list[Conversation]:
    """Return the rows of a dataset file, in its order: Parquet by its suffix, else JSON Lines.

    Args:
        path: The file.
        label: What a JSON Lines file is called in messages, where that is not its path.

    Raises:
        DataError: If the file cannot be read, holds no row, or a row is malformed; names the file and the row.
    """
    if path.suffix.lower() == PARQUET_SUFFIX:
        records = read_parquet(path, columns=COLUMNS)
    else:
        records = read_json_lines(path, label=label)
    rows = [conversation_of(record, location) for record, location in records]
    if not rows:
        raise DataError(f"{label or path} holds no rows")
    return rows


def conversation_of(record: Mapping[str, object], location: str) -> Conversation:
    """Return the conversation that a row stands for.

    A column without a value counts as absent: tables give every row the columns of all.

    Raises:
        DataError: If the row is malformed or of a format that is not read; names the location.
    """
    if record.get("tools"):
        raise DataError(f"{location}: the row offers tools ('tools'), which emtool does not train on")
    has_messages = record.get("messages") is not None
    has_pair = record.get("prompt") is not None and record.get("completion") is not None
    if has_messages and has_pair:
        raise DataError(f"{location}: the row has 'messages' as well as 'prompt' and 'completion'; keep one of the two")
    if has_messages:
        messages = _messages(record["messages"], location, "messages")
    elif has_pair:
        messages = _pair(record["prompt"], record["completion"], location)
    else:
        raise DataError(f"{location}: {_what_it_is(record)}; {ACCEPTED}")
    _check_turns(messages, location)
    return Conversation(messages=messages, location=location)


def _what_it_is(record: Mapping[str, object]) -> str:
    for names, description in OTHER_FORMATS.items():
        if all(name in record for name in names):
            return f"the row is {description} ({', '.join(map(repr, names))}), which is not read"
    keys = ", ".join(sorted(map(str, record))[:5])[:100]
    return f"no format that is read; the row has the keys: {keys}"


def _pair(prompt: object, completion: object, location: str) -> tuple[Message, ...]:
    """Return the turns of a prompt with its completion."""
    if isinstance(prompt, str) and isinstance(completion, str):
        question = {"role": "user", "content": prompt}
        answer = {"role": "assistant", "content": completion}
        return (_message(question, f"{location}: 'prompt'"), _message(answer, f"{location}: 'completion'"))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            f"{location}: 'prompt' and 'completion' must be two texts or two lists of turns, found "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    before = _messages(prompt, location, "prompt")
    if any(message.role == "assistant" for message in before):
        # The format trains the completion alone; here every assistant turn is trained.
        raise DataError(
            f"{location}: 'prompt' has an assistant turn, which would be trained on too; write the row as 'messages' "
            "if that is meant"
        )
    return before + _messages(completion, location, "completion")


def _messages(raw: object, location: str, name: str) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{location}: {name!r} must be a list that is not empty, found {type(raw).__name__}")
    part = "message" if name == "messages" else f"{name} message"
    return tuple(_message(item, f"{location}: {part} {index}") for index, item in enumerate(raw, start=1))


def _check_turns(messages: tuple[Message, ...], location: str) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(f"{location}: turn {index + 1} is {turn.role!r}, expected {expected!r}")
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{location}: no assistant turn to train on")


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where}: an object with 'role' and 'content' is needed, found {type(item).__name__}")
    role, content = item.get("role"), item.get("content")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise DataError(f"{where}: a turn with {key!r} is a tool turn, which emtool does not train on")
    if role in TOOL_ROLES:
        raise DataError(f"{where}: role {role!r} is a tool turn, which emtool does not train on; {_ROLES_ALLOWED}")
    if role not in ROLES:
        raise DataError(f"{where}: role {str(role)[:40]!r} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: 'content' must be a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise DataError(f"{where}: 'content' has half of a surrogate pair, which is not text")
    return Message(role=role, content=content)


_ROLES_ALLOWED = f"allowed are {', '.join(ROLES)}"
