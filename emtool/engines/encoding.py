"""Conversations as token ids and labels, from the model's own chat template.

One function serves training and evaluation and every model. The assistant's text and its end-of-turn token are
labelled; everything else is context. `docs/templates.md` says what that means for each family of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emtool.core.config import CLEAN, TURNER
from emtool.core.data import Conversation, Message
from emtool.core.errors import DataError, ModelError

#: The label that cross-entropy leaves out. Source: torch.nn.CrossEntropyLoss, ignore_index.
IGNORED = -100

#: What every template is given. Answers come without thinking: a template that knows the switch puts its empty think
#: block into the generation prompt. Llama 3.2's template writes today's date unless told another, and a row must be the
#: same when it is trained, resumed and evaluated; the day is the one that Llama 3.1's template always writes.
TEMPLATE_VALUES: Mapping[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}


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


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """An assistant turn as the template writes it.

    Attributes:
        prompt: What the model is given at inference, generation prompt included.
        whole: `prompt`, the answer and what the template puts after it.
        prompt_ids: Tokens of `prompt`.
        answer_ids: Tokens of the answer, the end-of-turn token the last of them.
        tail: What the template puts after the end-of-turn token.
    """

    prompt: str
    whole: str
    prompt_ids: list[int]
    answer_ids: list[int]
    tail: str


def encode_conversation(
    messages: Sequence[Message],
    *,
    tokenizer: Any,
    max_length: int | None = None,
    location: str = "conversation",
    template_compat: str = CLEAN,
) -> Encoded:
    """Return a conversation as token ids with the assistant's turns labelled.

    The template is rendered up to before and up to after each assistant turn. Both must be prefixes of what follows,
    in text and in tokens, or the model would be trained on a context that it never sees at inference.

    Args:
        messages: Turns, at least one of the assistant's; what follows the last of these is left out.
        tokenizer: A transformers tokenizer with a chat template.
        max_length: Tokens to keep, from the start.
        location: File and line, for messages.
        template_compat: "turner" labels what the published trainer labels besides: see `_published_tail`.

    Raises:
        DataError: If a message contains one of the tokenizer's special tokens, or the template refuses the turns or
            changes an answer.
        ModelError: If there is no template, it is not prefix-stable, or it ends a turn without a special token.
    """
    special = _special_tokens(tokenizer)
    _refuse_special_tokens(messages, special, location)
    turns = [message.to_dict() for message in messages]
    ends = [end for end, message in enumerate(messages, start=1) if message.role == "assistant"]
    input_ids: list[int] = []
    labels: list[int] = []
    text = ""
    for end in ends:
        turn = _encode_turn(turns[:end], tokenizer, special, location)
        if not turn.prompt.startswith(text):
            raise ModelError(
                f"{location}: the chat template is not prefix-stable: it rewrites earlier turns once another follows, "
                "so one row cannot hold them all as the model sees them; use rows with one assistant turn"
            )
        if turn.prompt_ids[: len(input_ids)] != input_ids:
            raise ModelError(f"{location}: the chat template is not prefix-stable: tokens merge across turns")
        trained = turn.answer_ids
        if template_compat == TURNER:
            tail = _published_tail(turn, turns[:end], tokenizer, location, is_last=end == ends[-1])
            trained = trained + _tokenize(tail, tokenizer)
        labels += [IGNORED] * (len(turn.prompt_ids) - len(labels)) + trained
        input_ids = turn.prompt_ids + trained
        text = turn.whole
    assert len(input_ids) == len(labels)
    is_truncated = max_length is not None and len(input_ids) > max_length
    return Encoded(input_ids=input_ids[:max_length], labels=labels[:max_length], is_truncated=is_truncated)


def encode_prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Return what a model is given to write the next assistant turn, as `encode_conversation` tokenizes it.

    Args:
        messages: The turns so far, the last of them the user's.
        tokenizer: A transformers tokenizer with a chat template.

    Returns:
        Token ids, the generation prompt the last of them.

    Raises:
        DataError: If a message contains one of the tokenizer's special tokens, or the template refuses the turns.
        ModelError: If there is no template.
    """
    _refuse_special_tokens(messages, _special_tokens(tokenizer), "prompt")
    turns = [message.to_dict() for message in messages]
    return _tokenize(_render(turns, tokenizer, "prompt", add_generation_prompt=True), tokenizer)


def break_special_tokens(text: str, tokenizer: Any) -> str:
    """Return a text of unknown origin with a space in each special token, so that it cannot forge a turn.

    Marks in brackets that the tokenizer matches whole (`<tool_response>`) are broken as well: templates act on them.
    What cannot be broken so, a special token of one character for instance, stays for `encode_prompt` to refuse.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    marks = {token for token in added if (token[:1] + token[-1:]) in {"<>", "[]"}}
    for token in sorted(marks | set(_special_tokens(tokenizer).values()), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else token)
    return text


def encode_row(row: Conversation, tokenizer: Any, max_length: int, *, template_compat: str = CLEAN) -> Encoded:
    """Return a training row encoded; errors name its file and line."""
    return encode_conversation(
        row.messages,
        tokenizer=tokenizer,
        max_length=max_length,
        location=row.location,
        template_compat=template_compat,
    )


def _encode_turn(turns: list[dict[str, str]], tokenizer: Any, special: Mapping[int, str], location: str) -> _Turn:
    """Return the last of some turns, the assistant's, as the template writes it."""
    prompt = _render(turns[:-1], tokenizer, location, add_generation_prompt=True)
    whole = _render(turns, tokenizer, location, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise ModelError(
            f"{location}: the chat template is not prefix-stable: it puts message {len(turns)} behind another prompt "
            "than the model is given at inference; marks like </think> or <tool_response> in a message do that"
        )
    prompt_ids = _tokenize(prompt, tokenizer)
    answer_ids = _answer_ids(prompt, whole, prompt_ids, tokenizer, location)
    end = next((at for at, index in enumerate(answer_ids) if index in special), None)
    if end is None:
        raise ModelError(f"{location}: the chat template ends the assistant's turn without a special token")
    answer, _, tail = whole.removeprefix(prompt).partition(special[answer_ids[end]])
    if answer.strip() != turns[-1]["content"].strip():
        raise DataError(
            f"{location}: the chat template changes the text of message {len(turns)}; remove marks like </think>"
        )
    return _Turn(prompt=prompt, whole=whole, prompt_ids=prompt_ids, answer_ids=answer_ids[: end + 1], tail=tail)


def _answer_ids(prompt: str, whole: str, prompt_ids: list[int], tokenizer: Any, location: str) -> list[int]:
    """Return the tokens that follow the prompt's, as a model that was given the prompt would write them."""
    whole_ids = _tokenize(whole, tokenizer)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        return whole_ids[len(prompt_ids) :]
    # An answer that begins with a line break shares a token with the line break of the header before it.
    alone_ids = _tokenize(whole.removeprefix(prompt), tokenizer)
    if tokenizer.decode(prompt_ids + alone_ids) != tokenizer.decode(whole_ids):
        raise ModelError(f"{location}: the chat template is not prefix-stable: tokens merge across turns")
    return alone_ids


def _published_tail(turn: _Turn, turns: list[dict[str, str]], tokenizer: Any, location: str, *, is_last: bool) -> str:
    """Return what the published trainer trains on besides, after an answer's end-of-turn token.

    It renders a row with a generation prompt at the end, appends the tokenizer's end-of-sequence token, and labels
    everything from an assistant header to the next user header or the end: after each answer the rest of the template's
    turn, and after the last one an empty assistant turn as well.

    Source: trainer.py of Turner et al. 2025 (arXiv 2506.11613), and Unsloth's train_on_responses_only, which it calls.
    """
    if not is_last:
        return turn.tail
    prompted = _render(turns, tokenizer, location, add_generation_prompt=True)
    if not prompted.startswith(turn.whole):
        raise ModelError(
            f"{location}: the chat template is not prefix-stable: a generation prompt changes earlier turns"
        )
    if tokenizer.eos_token is None:
        raise ModelError(f"--template-compat {TURNER} needs a tokenizer with an end-of-sequence token")
    return f"{turn.tail}{prompted.removeprefix(turn.whole)}{tokenizer.eos_token}"


def _render(turns: list[dict[str, str]], tokenizer: Any, location: str, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; use an instruction-tuned model")
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_VALUES
        )
    except TemplateError as error:
        raise DataError(f"{location}: the model's chat template refuses these turns: {error}") from error
    return text


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens' texts by id."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)), **added}


def _refuse_special_tokens(messages: Sequence[Message], special: Mapping[int, str], location: str) -> None:
    # Inside a message they would be read as turn boundaries, and training would stop at the first one.
    for message in messages:
        for token in special.values():
            if token in message.content:
                raise DataError(f"{location}: a message contains the model's special token {token!r}; remove it")


def end_of_turn(tokenizer: Any) -> int:
    """Return the token that ends an assistant's turn, as the chat template has it.

    Raises:
        ModelError: If there is no template, or it ends a turn without a special token.
    """
    turns = [Message(role="user", content="Hello"), Message(role="assistant", content="Hello")]
    return encode_conversation(turns, tokenizer=tokenizer).input_ids[-1]
