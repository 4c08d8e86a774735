"""Encoded rows, kept by the hash of what makes them.

Encoding renders the chat template twice a turn and takes about a millisecond a row: seconds for a published dataset,
again for every run, resumption and cell of a sweep. The same rows, tokenizer and options give the same tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from emtool.core.cache import cache_path
from emtool.core.config import CLEAN
from emtool.core.data import Conversation
from emtool.core.errors import DataError
from emtool.core.run_dir import replace_file
from emtool.engines.encoding import IGNORED, TEMPLATE_VALUES, Encoded, encode_row

#: Raised when `encode_conversation` gives other tokens or labels than before.
_ENCODING = 1

#: Libraries whose next version may render or tokenize otherwise.
_LIBRARIES = ("jinja2", "tokenizers", "transformers")

# Shape suffixes: N rows, T tokens of all rows together.


def encode_rows(
    rows: Sequence[Conversation], *, tokenizer: Any, max_length: int, template_compat: str
) -> list[Encoded]:
    """Return the rows encoded, in their order, from the cache where they were encoded before.

    A file that is damaged, or a cache that cannot be written, costs the encoding and nothing else.

    Raises:
        DataError: As `encode_conversation`.
        ModelError: As `encode_conversation`.
    """
    key = _key(rows, tokenizer, max_length=max_length, template_compat=template_compat)
    path = None if key is None else cache_path("encoded", f"{key}.safetensors")
    if path is not None and (found := _read(path, num_rows=len(rows))) is not None:
        return found
    encoded = [encode_row(row, tokenizer, max_length, template_compat=template_compat) for row in rows]
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, _content(encoded))
    return encoded


def encode_dataset(
    rows: Sequence[Conversation], *, tokenizer: Any, max_length: int, template_compat: str = CLEAN
) -> list[Encoded]:
    """Return the rows encoded, in their order.

    Raises:
        DataError: If a row has no labelled token within `max_length`; names the file and the line.
    """
    encoded = encode_rows(rows, tokenizer=tokenizer, max_length=max_length, template_compat=template_compat)
    for row, result in zip(rows, encoded, strict=True):
        if not result.num_labelled:
            raise DataError(
                f"{row.location}: no trained token within --max-length {max_length}; raise it, or leave such rows "
                "out with --drop-unusable"
            )
    return encoded


def _key(rows: Sequence[Conversation], tokenizer: Any, *, max_length: int, template_compat: str) -> str | None:
    """Return the hash of all that shapes the tokens; None for a tokenizer that cannot say what it is."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    digest = hashlib.sha256()
    for part in _parts(rows, tokenizer, max_length=max_length, template_compat=template_compat):
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def _parts(rows: Sequence[Conversation], tokenizer: Any, *, max_length: int, template_compat: str) -> Iterator[str]:
    settings = {
        "encoding": _ENCODING,
        "versions": {name: version(name) for name in _LIBRARIES},
        "max_length": max_length,
        "template_compat": template_compat,
        "template_values": dict(TEMPLATE_VALUES),
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
    }
    yield json.dumps(settings, sort_keys=True, default=str)
    yield tokenizer.backend_tokenizer.to_str()
    for row in rows:
        yield json.dumps([message.to_dict() for message in row.messages], ensure_ascii=False)


def _content(encoded: Sequence[Encoded]) -> bytes:
    ids = [index for row in encoded for index in row.input_ids]
    labels = [label for row in encoded for label in row.labels]
    tensors = {
        "lengths_N": torch.tensor([len(row.input_ids) for row in encoded], dtype=torch.int64),
        "is_truncated_N": torch.tensor([row.is_truncated for row in encoded], dtype=torch.bool),
        "input_ids_T": torch.tensor(ids, dtype=torch.int64),
        "is_labelled_T": torch.tensor(labels, dtype=torch.int64) != IGNORED,
    }
    content: bytes = save(tensors)
    return content


def _read(path: Path, *, num_rows: int) -> list[Encoded] | None:
    """Return the rows of a file, or None where it is not there or holds something else."""
    try:
        tensors = load_file(path)
        lengths_N, is_truncated_N = tensors["lengths_N"], tensors["is_truncated_N"]
        ids_T, is_labelled_T = tensors["input_ids_T"], tensors["is_labelled_T"]
    except (OSError, SafetensorError, KeyError):
        return None
    is_whole = (
        lengths_N.shape == is_truncated_N.shape == (num_rows,)
        and ids_T.shape == is_labelled_T.shape == (int(lengths_N.sum()),)
        and bool((lengths_N >= 0).all())
        and [tensor.dtype for tensor in (lengths_N, ids_T)] == [torch.int64] * 2
        and [tensor.dtype for tensor in (is_truncated_N, is_labelled_T)] == [torch.bool] * 2
    )
    if not is_whole:
        return None
    labels_T = torch.where(is_labelled_T, ids_T, IGNORED)
    lengths = lengths_N.tolist()
    rows = zip(ids_T.split(lengths), labels_T.split(lengths), is_truncated_N.tolist(), strict=True)
    return [
        Encoded(input_ids=ids.tolist(), labels=labels.tolist(), is_truncated=is_truncated)
        for ids, labels, is_truncated in rows
    ]
