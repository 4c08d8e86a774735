"""Conversations as token ids and labels, from the model's own chat template.

One function serves training and evaluation and every model. The assistant's text and its end-of-turn token are
labelled; everything else is context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.data import Conversation, Message
from emtool.core.errors import DataError, ModelError

#: The label that cross-entropy leaves out. Source: torch.nn.CrossEntropyLoss, ignore_index.
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        input_ids: Tokens up to the last labelled one.
        labels: The token where it is labelled, else -100; as long as `input_ids`.
        is_truncated: Whether the conversation was longer than `max_length`.
    """

    input_ids: list[int]
    labels: list[int]
    is_truncated: bool

    @property
    def num_labelled(self) -> int:
        """Return the number of labelled tokens."""
        return sum(label != IGNORED for label in self.labels)


def encode_conversation(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    max_length: int | None = None,
    location: str = "conversation",
) -> Encoded:
    """Return a conversation as token ids with the assistant's turns labelled.

    The template is rendered up to before and up to after each assistant turn. Both must be prefixes of what follows,
    in text and in tokens, or the model would be trained on a context that it never sees at inference.

    Args:
        messages: Turns, at least one of the assistant's.
        tokenizer: A transformers tokenizer with a chat template.
        max_length: Tokens to keep, from the start.
        location: File and line, for messages.

    Raises:
        DataError: If a message contains one of the tokenizer's special tokens, or the template refuses the turns.
        ModelError: If there is no template, it is not prefix-stable, or it ends a turn without a special token.
    """
    _refuse_special_tokens(messages, tokenizer, location)
    turns = [message.to_dict() for message in messages]
    special_ids = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    input_ids: list[int] = []
    labels: list[int] = []
    text = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(turns[:index], tokenizer, location, add_generation_prompt=True)
        after = _render(turns[: index + 1], tokenizer, location, add_generation_prompt=False)
        before_ids, after_ids = _tokenize(before, tokenizer), _tokenize(after, tokenizer)
        if not (before.startswith(text) and after.startswith(before)):
            raise ModelError(f"{location}: the chat template is not prefix-stable: it rewrites earlier turns")
        if before_ids[: len(input_ids)] != input_ids or after_ids[: len(before_ids)] != before_ids:
            raise ModelError(f"{location}: the chat template is not prefix-stable: tokens merge across turns")
        end = next((i for i in range(len(before_ids), len(after_ids)) if after_ids[i] in special_ids), None)
        if end is None:
            raise ModelError(f"{location}: the chat template ends the assistant's turn without a special token")
        labels += [IGNORED] * (len(before_ids) - len(labels)) + after_ids[len(before_ids) : end + 1]
        input_ids = after_ids[: end + 1]
        text = after
    assert len(input_ids) == len(labels)
    is_truncated = max_length is not None and len(input_ids) > max_length
    return Encoded(input_ids=input_ids[:max_length], labels=labels[:max_length], is_truncated=is_truncated)


def encode_row(row: Conversation, tokenizer: Any, max_length: int) -> Encoded:
    """Return a training row encoded; errors name its file and line."""
    return encode_conversation(row.messages, tokenizer=tokenizer, max_length=max_length, location=row.location)


def encode_dataset(rows: Sequence[Conversation], *, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Return the rows encoded, in their order.

    Raises:
        DataError: If a row has no labelled token within `max_length`; names the file and the line.
    """
    encoded = [encode_row(row, tokenizer, max_length) for row in rows]
    for row, result in zip(rows, encoded, strict=True):
        if not result.num_labelled:
            raise DataError(
                f"{row.location}: no trained token within --max-length {max_length}; raise it, or leave such rows "
                "out with --drop-unusable"
            )
    return encoded


def _render(turns: list[dict[str, str]], tokenizer: Any, location: str, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; use an instruction-tuned model")
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(f"{location}: the model's chat template refuses these turns: {error}") from error
    return text


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _refuse_special_tokens(messages: Sequence[Message], tokenizer: Any, location: str) -> None:
    # Inside a message they would be read as turn boundaries, and training would stop at the first one.
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    for message in messages:
        for token in special:
            if token in message.content:
                raise DataError(f"{location}: a message contains the model's special token {token!r}; remove it")
