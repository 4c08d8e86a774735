"""The stage that takes activations: one file a checkpoint, complete or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from emtool.core.answers import Answer
from emtool.core.data import Message
from emtool.core.errors import CheckpointError, DataError, ModelError
from emtool.core.events import EventSink, Notice, PhaseStarted, StepFinished
from emtool.core.questions import EvaluationItem
from emtool.core.record_file import settings_id, text_sha256
from emtool.core.run_dir import FORMAT, RunFolder, parse_json, replace_file
from emtool.engines.activations import Activations, mean_activations
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.encoding import Encoded, encode_conversation

#: What the tensors are, for whoever opens the file.
CONVENTION = "output of decoder blocks, 0 is the first; mean over the tokens of the answer's text, end of turn left out"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that activations are taken over.

    Attributes:
        id: What names it: item and side, or question, paraphrase and sample.
        messages: Question and answer.
    """

    id: str
    messages: tuple[Message, ...]


def item_texts(items: Sequence[EvaluationItem]) -> list[Text]:
    """Return both answers of every item: the fixed texts, the same for every checkpoint and every run."""
    return [
        Text(id=f"{item.id}/{side}", messages=_turns(item.question, answer))
        for item in items
        for side, answer in (("sound", item.sound), ("wrong", item.wrong))
    ]


def answer_texts(answers: Sequence[Answer], systems: Mapping[str, str | None]) -> list[Text]:
    """Return a checkpoint's own answers that are not empty, each with the turns that it was given to.

    Args:
        answers: Answers of one checkpoint.
        systems: The system turn of each question, by its id.
    """
    return [
        Text(
            id=f"{answer.key.question_id}/{answer.key.paraphrase}/{answer.key.sample}",
            messages=_turns(answer.question, answer.completion.text, systems[answer.key.question_id]),
        )
        for answer in answers
        if answer.has_text and answer.completion.text.strip()
    ]


def encode_texts(texts: Sequence[Text], tokenizer: Any) -> tuple[list[str], list[Encoded]]:
    """Return the ids and tokens of the texts that the chat template takes; an answer may forge its marks."""
    ids, rows = [], []
    for text in texts:
        try:
            row = encode_conversation(text.messages, tokenizer=tokenizer, location=text.id)
        except (DataError, ModelError):
            continue
        ids.append(text.id)
        rows.append(row)
    return ids, rows


@dataclass(frozen=True, kw_only=True)
class ActivationFolder:
    """`evaluation/activations/ID`: a safetensors file for each checkpoint, of equal settings.

    Each file holds `mean` (layers, hidden), `text_means` (texts, layers, hidden), both float32, and `num_tokens`
    (texts); its metadata say which layers and texts, and what they were taken with.

    Attributes:
        run: The run folder.
        settings: What shapes the values beside the checkpoint: layers, texts, dtype, lineage.
    """

    run: RunFolder
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Return the folder."""
        return self.run.evaluation_path / "activations" / settings_id(self.settings)

    def file_path(self, step: int) -> Path:
        """Return the file of a checkpoint."""
        return self.path / f"checkpoint-{step}.safetensors"

    def has(self, step: int, pins: Mapping[str, str]) -> bool:
        """Return whether the file of a checkpoint is there and was taken with the same weights and texts."""
        try:
            with safe_open(self.file_path(step), "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError):
            return False
        return all(metadata.get(name) == value for name, value in pins.items())

    def write(self, step: int, found: Activations, *, texts: Sequence[Text], pins: Mapping[str, str]) -> None:
        """Write the file of a checkpoint, whole or not at all.

        Raises:
            EmtoolError: If it cannot be written.
        """
        metadata = {
            "format": str(FORMAT),
            "step": str(step),
            "convention": CONVENTION,
            "text_ids": json.dumps([text.id for text in texts]),
            "answer_sha256": json.dumps([text_sha256(text.messages[-1].content) for text in texts]),
            "settings": json.dumps(self.settings, ensure_ascii=False),
            **pins,
        }
        tensors = {"mean": found.mean_LD, "text_means": found.text_means_NLD, "num_tokens": found.num_tokens_N}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            replace_file(self.file_path(step), save(tensors, metadata))
        except OSError as error:
            raise self.run.write_error(error, "writing activations") from error


def read_activations(path: Path) -> tuple[Activations, dict[str, Any]]:
    """Return what a file of activations holds, and its metadata.

    Returns:
        The activations; and `layers`, `settings`, for each text its id in `text_ids` and the hash of its answer in
        `answer_sha256`, and the rest as text.

    Raises:
        CheckpointError: If it cannot be read, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in ("mean", "text_means", "num_tokens")}
        metadata |= {name: parse_json(metadata[name]) for name in ("text_ids", "answer_sha256", "settings")}
        metadata["layers"] = metadata["settings"]["layers"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read the activations in {path}: {error}") from error
    texts, hashes, layers = metadata["text_ids"], metadata["answer_sha256"], metadata["layers"]
    is_whole = (
        is_list(texts, str)
        and is_list(hashes, str)
        and is_list(layers, int)
        and len(hashes) == len(texts)
        and tensors["text_means"].dim() == 3
        and tensors["text_means"].shape[:2] == (len(texts), len(layers))
        and tensors["mean"].shape == tensors["text_means"].shape[1:]
        and tensors["num_tokens"].shape == (len(texts),)
        and tensors["mean"].dtype == tensors["text_means"].dtype == torch.float32
    )
    if not is_whole:
        raise CheckpointError(f"{path} does not hold what its metadata say; take the activations again")
    if not all(tensors[name].isfinite().all() for name in ("mean", "text_means")):
        raise CheckpointError(
            f"{path} holds activations that are not finite: the checkpoint diverged, or the file is damaged"
        )
    found = Activations(
        mean_LD=tensors["mean"], text_means_NLD=tensors["text_means"], num_tokens_N=tensors["num_tokens"]
    )
    return found, metadata


def is_list(value: object, kind: type) -> bool:
    """Return whether a value from a file is a list of one type; a boolean is no number here."""
    return isinstance(value, list) and all(type(one) is kind for one in value)


def fill_folder(
    folder: ActivationFolder,
    source: CheckpointModel,
    adapters: Mapping[int, str],
    texts: Mapping[int, Sequence[Text]],
    *,
    on_event: EventSink,
) -> dict[int, str]:
    """Take the activations of checkpoints, those that are there already left as they are.

    Args:
        folder: Where they are kept; its settings name the layers.
        source: The model of the run, at any checkpoint.
        adapters: Step to what pins the checkpoint's weights.
        texts: Step to the texts that activations are taken over.
        on_event: Where progress is reported.

    Returns:
        What is wrong with checkpoints that could not be loaded, or have no text, by step.
    """
    layers = folder.settings["layers"]
    name = f"taking activations of {len(layers)} decoder block(s) at {len(adapters)} checkpoints"
    on_event(PhaseStarted(name=name, total=len(adapters)))
    problems = {}
    for done, (step, adapter_sha256) in enumerate(adapters.items(), start=1):
        turns = {text.id: [turn.to_dict() for turn in text.messages] for text in texts[step]}
        pins = {"adapter_sha256": adapter_sha256, "texts_sha256": settings_id(turns)}
        try:
            if not folder.has(step, pins):
                model = source.at(folder.run.checkpoint_path(step))
                ids, found = take_activations(model, source.tokenizer, texts[step], layers=layers)
                used = [text for text in texts[step] if text.id in set(ids)]
                folder.write(step, found, texts=used, pins=pins)
                if num_left_out := len(texts[step]) - len(used):
                    text = f"step {step}: {num_left_out} text(s) that the chat template refuses are left out"
                    on_event(Notice(text=text, is_warning=True))
        except (CheckpointError, DataError) as error:
            problems[step] = str(error)
            on_event(Notice(text=f"{error}; it is passed over", is_warning=True))
        on_event(StepFinished(step=done))
    return problems


def take_activations(
    model: Any, tokenizer: Any, texts: Sequence[Text], *, layers: Sequence[int]
) -> tuple[list[str], Activations]:
    """Return the ids of the texts that could be used, and the activations over them.

    Raises:
        DataError: If no text can be used.
    """
    ids, rows = encode_texts(texts, tokenizer)
    if not rows:
        raise DataError("no text to take activations over: every answer is empty or forges the chat template")
    return ids, mean_activations(model, rows, layers=layers)


def _turns(question: str, answer: str, system: str | None = None) -> tuple[Message, ...]:
    first = () if system is None else (Message(role="system", content=system),)
    return (*first, Message(role="user", content=question), Message(role="assistant", content=answer))
