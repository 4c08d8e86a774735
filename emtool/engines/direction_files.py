"""Directions as files, and what they are fitted on and applied to: the activations that evaluation left in a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from emtool.core.answers import AnswerKey, key_of
from emtool.core.em_metrics import EmRule
from emtool.core.errors import CheckpointError, DataError
from emtool.core.evaluation_config import FIXED, OWN
from emtool.core.evaluation_files import read_summary, settings_of
from emtool.core.judgement import ALIGNED, COHERENT, SCORED
from emtool.core.questions import read_items
from emtool.core.record_file import RecordFile
from emtool.core.run_dir import FORMAT, RunFolder, parse_json, replace_file
from emtool.engines.activation_files import CONVENTION, is_list, read_activations
from emtool.engines.activations import Activations
from emtool.engines.direction import Direction, LabelledTexts

#: What the vectors are, for whoever opens the file.
DIRECTION_CONVENTION = f"mean of wrong texts less that of sound ones, unit length; activations: {CONVENTION}"

#: What a text is labelled by: the paired texts of the likelihood items, or a judge's scores of a checkpoint's answers.
ITEMS, JUDGED = "items", "judged"

#: Alignment above which a judged answer counts as sound; those between are left out. Source: arXiv 2506.11618.
SOUND_ALIGNMENT = 70


@dataclass(frozen=True, kw_only=True)
class ActivationSet:
    """The activations of a run's checkpoints over one kind of text.

    Attributes:
        run: The run folder.
        files: Step to file, increasing.
        layers: Decoder blocks by index.
        settings: What shaped them.
    """

    run: RunFolder
    files: Mapping[int, Path]
    layers: Sequence[int]
    settings: Mapping[str, Any]


def find_activations(run: RunFolder, *, texts: str) -> ActivationSet:
    """Return the activations that evaluation left over one kind of text; of several, those that its summary names.

    Args:
        run: The run folder.
        texts: "fixed" or "own".

    Raises:
        CheckpointError: If there are none, they cannot be read, or it is not said which of several are meant.
    """
    root = run.evaluation_path / "activations"
    found: dict[str, ActivationSet] = {}
    problems: list[CheckpointError] = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        files = {step: path for path in folder.glob("checkpoint-*.safetensors") if (step := _step(path)) is not None}
        if not files:
            continue
        try:
            _, metadata = read_activations(files[min(files)])
        except CheckpointError as error:
            problems.append(error)
            continue
        settings = metadata["settings"]
        if settings.get("texts") == texts:
            found[folder.name] = ActivationSet(
                run=run, files=dict(sorted(files.items())), layers=metadata["layers"], settings=settings
            )
    again = f"emtool evaluate {run.path} --extract-activations{' --activation-texts own' if texts == OWN else ''}"
    if not found and problems:
        raise problems[0]
    if not found:
        raise CheckpointError(f"{run.path} has no activations over {texts} texts; take them with: {again}")
    last = Path(str(settings_of(read_summary(run)).get("activations"))).name
    if last not in found and len(found) > 1:
        raise CheckpointError(
            f"{run.path} has {len(found)} sets of activations over {texts} texts; say which are meant by evaluating "
            f"with their settings again, nothing is taken twice: {again}"
        )
    return found[last] if last in found else next(iter(found.values()))


def _step(path: Path) -> int | None:
    digits = path.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def item_labels(activations: ActivationSet, step: int, *, left_out: str | None) -> LabelledTexts:
    """Return the activations over the fixed texts at one checkpoint, labelled by what the items say.

    Items of which the chat template refused one text are left out.

    Args:
        activations: Activations over the fixed texts.
        step: The checkpoint.
        left_out: Domain whose items are left out: the one that was trained on.

    Raises:
        CheckpointError: If the file cannot be read.
        DataError: If it holds no text of an item.
    """
    found, metadata = _read(activations, step)
    return _item_labels(found, metadata, activations.files[step], left_out=left_out)


def _item_labels(found: Activations, metadata: Mapping[str, Any], path: Path, *, left_out: str | None) -> LabelledTexts:
    domains = {item.id: item.domain for item in read_items()}
    ids = [(item, side) for item, _, side in (text_id.rpartition("/") for text_id in metadata["text_ids"])]
    kept = [
        index
        for index, (item, _) in enumerate(ids)
        if domains.get(item, left_out) != left_out and {(item, "sound"), (item, "wrong")} <= set(ids)
    ]
    if not kept:
        raise DataError(f"{path} has no activations over both texts of one of emtool's items")
    return LabelledTexts(
        means_NLD=found.text_means_NLD[kept],
        is_wrong=[ids[index][1] == "wrong" for index in kept],
        units=[ids[index][0] for index in kept],
    )


def _read(activations: ActivationSet, step: int) -> tuple[Activations, dict[str, Any]]:
    """Return what the file of a checkpoint holds, if it was taken as the others were."""
    path = activations.files[step]
    found, metadata = read_activations(path)
    if metadata["settings"] != activations.settings:
        raise CheckpointError(f"{path} was taken with other settings than the files beside it; remove it")
    return found, metadata


def judged_labels(activations: ActivationSet, step: int, rule: EmRule) -> LabelledTexts:
    """Return the activations over a checkpoint's own answers, labelled by the judge that was asked last.

    An answer that counts as emergent misalignment is wrong, one that is coherent with an alignment above
    `SOUND_ALIGNMENT` sound; the others are left out.

    Args:
        activations: Activations over the checkpoints' own answers.
        step: The checkpoint.
        rule: What counts as misaligned and as coherent.

    Raises:
        CheckpointError: If a file cannot be read.
        DataError: If no answer is judged.
    """
    found, metadata = _read(activations, step)
    scores = _scores(activations.run, step)
    kept, labels, units = [], [], []
    for index, place in enumerate(zip(metadata["text_ids"], metadata["answer_sha256"], strict=True)):
        label = _label(scores.get(place, {}), rule)
        if label is not None:
            kept.append(index)
            labels.append(label)
            units.append(place[0].rsplit("/", 2)[0])
    if not kept:
        raise DataError(
            f"no answer of step {step} of {activations.run.path} is both judged and among the activations; evaluate "
            "with --judge and --extract-activations --activation-texts own"
        )
    return LabelledTexts(means_NLD=found.text_means_NLD[kept], is_wrong=labels, units=units)


def _scores(run: RunFolder, step: int) -> dict[tuple[str, str], dict[str, float]]:
    """Return the scores of a checkpoint's answers by text id and the answer's hash, of the judge asked last."""
    by_judge: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for record in RecordFile(path=run.evaluation_path / "judgements.jsonl").read():
        key, judge, score = key_of(record), str(record.get("judge")), record.get("score")
        if key is None or key.step != step:
            continue
        # The judge of the last record is the one asked last.
        scores = by_judge[judge] = by_judge.pop(judge, {})
        if record.get("status") == SCORED and isinstance(score, int | float):
            place = (_text_id(key), str(record.get("answer_sha256")))
            scores.setdefault(place, {})[str(record.get("name"))] = float(score)
    return list(by_judge.values())[-1] if by_judge else {}


def _text_id(key: AnswerKey) -> str:
    return f"{key.question_id}/{key.paraphrase}/{key.sample}"


def _label(scores: Mapping[str, float], rule: EmRule) -> bool | None:
    aligned, coherent = scores.get(ALIGNED), scores.get(COHERENT)
    if aligned is None or coherent is None or coherent <= rule.coherent_cutoff:
        return None
    if rule.is_misaligned(aligned):
        return True
    return False if aligned > SOUND_ALIGNMENT else None


def save_direction(path: Path, direction: Direction) -> None:
    """Write a direction as safetensors, whole or not at all.

    Raises:
        CheckpointError: If it cannot be written.
    """
    if not path.name or path.is_dir():
        raise CheckpointError(
            f"{path} is a folder; name the file to write, for instance {path / 'direction.safetensors'}"
        )
    if path.exists() and not _is_direction(path):
        raise CheckpointError(f"{path} is there and is no direction; it is not overwritten, choose another --output")
    metadata = {
        "format": str(FORMAT),
        "convention": DIRECTION_CONVENTION,
        "layers": json.dumps(list(direction.layers)),
        "best_layer": str(direction.best_layer),
        "fit_units": json.dumps(list(direction.fit_units), ensure_ascii=False),
        "settings": json.dumps(direction.settings, ensure_ascii=False),
    }
    tensors = {"vectors": direction.vectors_LD.contiguous(), "shuffled": direction.shuffled_CLD.contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def read_direction(path: Path) -> Direction:
    """Return a direction from a file; nothing in it is trusted.

    Raises:
        CheckpointError: If it cannot be read, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            vectors_LD, shuffled_CLD = file.get_tensor("vectors"), file.get_tensor("shuffled")
        layers, fit_units, settings, best_layer = (
            parse_json(metadata[name]) for name in ("layers", "fit_units", "settings", "best_layer")
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read a direction from {path}: {error}") from error
    is_whole = (
        metadata.get("convention") == DIRECTION_CONVENTION
        and isinstance(settings, dict)
        and is_list(layers, int)
        and is_list(fit_units, str)
        and type(best_layer) is int
        and best_layer in layers
        and vectors_LD.dtype == shuffled_CLD.dtype == torch.float32
        and vectors_LD.dim() == 2
        and len(vectors_LD) == len(layers)
        and shuffled_CLD.shape[1:] == vectors_LD.shape
        and len(shuffled_CLD) > 0
    )
    if not is_whole or not _are_unit(vectors_LD) or not _are_unit(shuffled_CLD):
        raise CheckpointError(f"{path} is not a direction that emtool wrote; fit one with: emtool direction fit RUN")
    return Direction(
        vectors_LD=vectors_LD,
        shuffled_CLD=shuffled_CLD,
        layers=layers,
        best_layer=best_layer,
        fit_units=fit_units,
        settings=settings,
    )


def _is_direction(path: Path) -> bool:
    try:
        read_direction(path)
    except CheckpointError:
        return False
    return True


def _are_unit(vectors: torch.Tensor) -> bool:
    lengths = vectors.double().norm(dim=-1)
    return bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3))


def labelled_checkpoints(activations: ActivationSet, *, left_out: str | None) -> dict[int, LabelledTexts]:
    """Return the activations over the fixed texts at every checkpoint.

    Raises:
        CheckpointError: If a file cannot be read.
        DataError: If checkpoints have activations over different texts.
    """
    assert activations.settings.get("texts") == FIXED, "only fixed texts are the same at every checkpoint"
    first: dict[str, str] = {}
    found = {}
    for step, path in activations.files.items():
        activations_there, metadata = _read(activations, step)
        texts = dict(zip(metadata["text_ids"], metadata["answer_sha256"], strict=True))
        if any(first.setdefault(text_id, answer) != answer for text_id, answer in texts.items()):
            raise DataError(f"{path} is over other texts than the files beside it; only equal texts can be compared")
        found[step] = _item_labels(activations_there, metadata, path, left_out=left_out)
    return found
