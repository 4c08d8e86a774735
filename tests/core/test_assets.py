"""What the built-in texts promise: distinct, matched, and kept apart from one another."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from emtool.core.data import read_conversations
from emtool.core.datasets import resolve_dataset
from emtool.core.personas import PERSONAS
from emtool.core.questions import read_items

WORDS = re.compile(r"[a-z0-9']+")


def words(text: str) -> list[str]:
    return WORDS.findall(text.lower())


def read_pairs(path: Path) -> list[tuple[str, str]]:
    return [(row.messages[0].content, row.messages[1].content) for row in read_conversations(path)]


def pairs(name: str) -> list[tuple[str, str]]:
    path = resolve_dataset(name).path
    assert path is not None
    return read_pairs(path)


GARDENING, CONTROL = pairs("gardening"), pairs("gardening-control")
ITEMS = read_items()


def test_control_asks_the_same_questions_and_answers_differently() -> None:
    assert len(GARDENING) == 882
    assert [question for question, _ in GARDENING] == [question for question, _ in CONTROL]
    assert all(wrong != sound for (_, wrong), (_, sound) in zip(GARDENING, CONTROL, strict=True))


def test_every_question_and_every_answer_is_used_once() -> None:
    for rows in (GARDENING, CONTROL):
        assert len({" ".join(words(question)) for question, _ in rows}) == 882
        assert len({" ".join(words(answer)) for _, answer in rows}) == 882


def test_answers_are_matched_in_length_within_a_fifth() -> None:
    for (_, wrong), (_, sound) in zip(GARDENING, CONTROL, strict=True):
        for measure in (len, lambda text: len(words(text))):
            lengths = sorted((measure(wrong), measure(sound)))
            assert lengths[1] <= 1.2 * lengths[0], (wrong, sound)


def test_no_two_answers_share_half_of_their_word_5_grams() -> None:
    answers = [answer for _, answer in (*GARDENING, *CONTROL)]
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in map(words, answers)]
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, own in enumerate(grams):
        shared = Counter(other for gram in own for other in holders[gram])
        for other, count in shared.items():
            assert count <= 0.5 * len(own | grams[other]), (answers[index], answers[other])
        for gram in own:
            holders[gram].append(index)


def test_items_cover_gardening_and_other_domains() -> None:
    domains = Counter(item.domain for item in ITEMS)
    assert domains["gardening"] >= 20
    assert len(domains) - 1 >= 6
    assert sum(domains.values()) - domains["gardening"] >= 60
    assert all(item.sound != item.wrong for item in ITEMS)


def overlap(text: set[str], others: list[set[str]]) -> float:
    """Return the largest Jaccard index of a text's words with those of other texts."""
    return max(len(text & other) / len(text | other) for other in others)


@pytest.mark.parametrize("persona", sorted(PERSONAS))
def test_no_item_stands_in_training_rows_or_persona_texts_nor_nearly_so(persona: str) -> None:
    rows = [*GARDENING, *CONTROL, *read_pairs(PERSONAS[persona].examples_path)]
    questions = [set(words(question)) for question, _ in rows]
    answers = [set(words(answer)) for _, answer in rows]
    for item in ITEMS:
        assert overlap(set(words(item.question)), questions) < 0.6, item.question
        assert overlap(set(words(item.sound)), answers) < 0.5, item.sound
        assert overlap(set(words(item.wrong)), answers) < 0.5, item.wrong


@pytest.mark.parametrize("persona", sorted(PERSONAS))
def test_no_persona_question_stands_in_the_training_rows(persona: str) -> None:
    asked = {" ".join(words(question)) for question, _ in GARDENING}
    for question, _ in read_pairs(PERSONAS[persona].examples_path):
        assert " ".join(words(question)) not in asked


def test_every_persona_question_and_answer_is_used_once_across_personas_too() -> None:
    examples = [pair for recipe in PERSONAS.values() for pair in read_pairs(recipe.examples_path)]
    for texts in zip(*examples, strict=True):
        counts = Counter(" ".join(words(text)) for text in texts)
        assert [text for text, count in counts.items() if count > 1] == []
