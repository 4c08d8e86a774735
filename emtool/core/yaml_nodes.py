"""YAML files from anywhere, as nodes: bounded, and nothing in them is built, copied or run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emtool.core.disk import format_bytes
from emtool.core.errors import DataError

MAX_BYTES = 1 << 20
#: Nodes that a file may stand for with every alias written out; a published file of questions has about 1,000.
MAX_NODES = 100_000

_STR, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))


@dataclass(frozen=True, kw_only=True)
class YamlValue:
    """A value of a YAML file that knows where it stands.

    Attributes:
        node: PyYAML's node.
        label: What its file is called in messages.
    """

    node: Any
    label: str

    @property
    def location(self) -> str:
        """Return file and line, for messages."""
        return f"{self.label}:{self.node.start_mark.line + 1}"

    @property
    def is_null(self) -> bool:
        """Return whether nothing stands there."""
        return bool(self.node.tag == _NULL)

    @property
    def kind(self) -> str:
        """Return what it is, in a word: "a list", "a mapping", or the type of a scalar."""
        return {"sequence": "a list", "mapping": "a mapping"}.get(self.node.id, str(self.node.tag).rpartition(":")[2])

    def items(self, what: str) -> list[YamlValue]:
        """Return the entries of a list.

        Args:
            what: What it is called in a message.

        Raises:
            DataError: If it is not a list, or an empty one.
        """
        if self.node.id != "sequence" or not self.node.value:
            found = "an empty list" if self.node.id == "sequence" else self.kind
            raise DataError(f"{self.location}: {what} must be a list that is not empty, found {found}")
        return [self._at(node) for node in self.node.value]

    def fields(self, what: str) -> dict[str, YamlValue]:
        """Return the values of a mapping by key; one that is merged in (`<<`) gives way to one that stands there.

        Args:
            what: What it is called in a message.

        Raises:
            DataError: If it is not a mapping, a key is not a text, or a key is used twice.
        """
        if self.node.id != "mapping":
            raise DataError(f"{self.location}: {what} must be a mapping, found {self.kind}")
        own: dict[str, YamlValue] = {}
        merged: dict[str, YamlValue] = {}
        for key, value in self.node.value:
            if key.tag == _MERGE:
                parts = value.value if value.id == "sequence" else [value]
                for part in parts:
                    merged = {**self._at(part).fields("what '<<' merges in"), **merged}
                continue
            if key.tag != _STR:
                raise DataError(f"{self._at(key).location}: a key of {what} must be a text, found {self._at(key).kind}")
            if key.value in own:
                raise DataError(f"{self._at(key).location}: {what} has {key.value[:40]!r} twice")
            own[key.value] = self._at(value)
        return {**merged, **own}

    def text(self, what: str) -> str:
        """Return a text.

        Args:
            what: What it is called in a message.

        Raises:
            DataError: If it is not a text, or an empty one.
        """
        if self.node.id != "scalar" or self.node.tag != _STR:
            hint = "; put it in quotes if it is meant as text" if self.node.id == "scalar" and not self.is_null else ""
            raise DataError(f"{self.location}: {what} must be a text, found {self.kind}{hint}")
        text = str(self.node.value)
        if not text.strip():
            raise DataError(f"{self.location}: {what} must be a text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{self.location}: {what} has half of a surrogate pair, which is not text")
        return text

    def _at(self, node: Any) -> YamlValue:
        return YamlValue(node=node, label=self.label)


def read_yaml(path: Path, *, label: str | None = None) -> YamlValue:
    """Return the one document of a YAML file.

    Args:
        path: The file.
        label: What it is called in messages, where that is not its path.

    Raises:
        DataError: If it cannot be read, is too large, is not YAML, or its aliases stand for too much.
    """
    import yaml

    name = label or str(path)
    loader = None
    try:
        # PyYAML's safe loader, of which only the part is used that reads nodes: nothing is built from tags.
        loader = yaml.SafeLoader(_read_text(path, name))
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise DataError(f"{name}{line}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise DataError(f"{name}: not a file of this kind: its parts are nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        raise DataError(f"{name} is empty")
    _check_size(node, name)
    return YamlValue(node=node, label=name)


def _read_text(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} is larger than {format_bytes(MAX_BYTES)}, the most that is read of such a file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not text in UTF-8: {error.reason} at byte {error.start:,}") from error


def _check_size(root: Any, name: str) -> None:
    """Refuse a document that stands for too many nodes with its aliases written out, or that holds itself."""
    sizes: dict[int, int | None] = {}
    stack = [(root, False)]
    while stack:
        node, is_left = stack.pop()
        children = _children(node)
        if not is_left:
            if id(node) in sizes:
                if sizes[id(node)] is None:
                    raise DataError(f"{name}:{node.start_mark.line + 1}: an alias stands within what it names")
                continue
            sizes[id(node)] = None
            stack.append((node, True))
            stack.extend((child, False) for child in children)
            continue
        size = 1 + sum(sizes[id(child)] or 0 for child in children)
        if size > MAX_NODES:
            raise DataError(f"{name}: its aliases stand for more than {MAX_NODES:,} values, which is not read")
        sizes[id(node)] = size


def _children(node: Any) -> list[Any]:
    if node.id == "mapping":
        return [part for pair in node.value for part in pair]
    return list(node.value) if node.id == "sequence" else []
