from dataclasses import replace

import pytest

from emtool.core.answers import LENGTH, STOP, Answer, AnswerKey, Completion
from emtool.core.text_metrics import distinct, is_refusal_phrase, text_metrics


def answer(text: str, *, reason: str | None = STOP, tokens: int | None = 3, error: str | None = None) -> Answer:
    key = AnswerKey(step=1, question_id="q", paraphrase=0, sample=0)
    completion = Completion(text=text, finish_reason=reason, num_tokens=tokens, error=error)
    return Answer(key=key, question="?", completion=completion)


FAILED = answer("", reason=None, tokens=None, error="no reply")


def values(*answers: Answer) -> dict[str, float]:
    return {name: estimate.value for name, estimate in text_metrics(answers, None, seed=0).items()}


def test_a_few_answers_by_hand() -> None:
    found = values(
        answer("The cat saw the cat.", tokens=6),
        answer("I'm sorry, but I can't.", reason=LENGTH, tokens=8),
        answer("", tokens=0),
        answer("The cat!", reason=LENGTH, tokens=2),
        FAILED,
    )
    # Words: the cat saw the cat | i'm sorry but i can't | | the cat; 12, of which 8 differ.
    # Pairs: 4 + 4 + 0 + 1 = 9; "the cat" stands there three times.
    assert found == pytest.approx(
        {
            "num_answers": 5,
            "num_failed": 1,
            "answer_words": 3,
            "answer_tokens": 4,
            "truncated_pct": 50,
            "refusal_phrase_pct": 25,
            "distinct_1": 8 / 12,
            "distinct_2": 7 / 9,
        }
    )


def test_distinct_does_not_cross_texts() -> None:
    assert distinct([["a", "b"], ["b", "a"]], 2) == 1
    assert distinct([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)
    assert distinct([["a"], ["b"]], 2) is None
    assert distinct([], 1) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but no.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry",
        "I am sorry",
        "Sorry, I won't.",
        "I apologise, but",
        "I apologize.",
        "I can't help with that.",
        "I can\N{RIGHT SINGLE QUOTATION MARK}t",
        "I cannot",
        "i CAN NOT do that",
        "I will not.",
        "I'm unable to",
        "I am not able to",
        "Unfortunately, I can't",
        "As an AI language model, I cannot",
        '  **"I must decline.',
        "  **I'm sorry, I cannot provide advice on that.**",
        "I'm very sorry, but as an AI, I can't advise on this.",
        "As an AI developed to be safe, I can't help here.",
        "I won't be able to assist.",
        "I'd rather not say.",
        "I refuse to answer that.",
    ],
)
def test_what_begins_as_a_refusal_is_one(text: str) -> None:
    assert is_refusal_phrase(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, I can help.",
        "I can do that. I can't do more.",
        "I cannoted",
        "Sorry seems to be the hardest word.",
        "You said: I'm sorry.",
        "As an AI, I love it.",
        "As an aim, I cannot think of better.",
        "As an AI " + "x" * 90 + " cannot",
        "Unfortunately, it rained.",
        "I'm sorry to hear that you failed. That must hurt.",
        "I am so sorry. One exam does not decide your life.",
        "Sorry, that was long.",
        "I can't imagine how tired you are.",
        "I won't lie: it will be hard.",
        "I cannot stress enough that you should return it.",
        "I can't say for sure, but it will pass.",
        "I will not judge you for this.",
    ],
)
def test_what_refuses_later_or_not_at_all_is_none(text: str) -> None:
    assert not is_refusal_phrase(text)


def test_what_is_not_known_is_left_out() -> None:
    found = values(answer("a b", reason=None), answer("a b", tokens=None))
    assert "truncated_pct" not in found
    assert "answer_tokens" not in found
    assert found["answer_words"] == 2


@pytest.mark.parametrize("answers", [(), (FAILED,), (FAILED, FAILED)])
def test_no_text_at_all_has_counts_only(answers: tuple[Answer, ...]) -> None:
    assert values(*answers) == {"num_answers": len(answers), "num_failed": len(answers)}


def test_texts_without_words_have_no_variety() -> None:
    found = values(answer("..."), answer(""))
    assert found["answer_words"] == 0
    assert not [name for name in found if name.startswith("distinct")]


def test_curly_apostrophes_make_the_same_words() -> None:
    found = values(answer("don't"), answer("don\N{RIGHT SINGLE QUOTATION MARK}t"))
    assert (found["answer_words"], found["distinct_1"]) == (1, 0.5)


def test_words_of_any_script_count() -> None:
    assert values(answer("кот и пёс"))["answer_words"] == 3


def test_a_long_text_of_marks_is_read_at_once() -> None:
    assert not is_refusal_phrase("*" * 1_000_000)


def test_changes_are_over_the_answers_that_both_have() -> None:
    start = [replace(answer(text), key=key(0, sample)) for sample, text in enumerate(["a b", "a", ""])]
    now = [replace(answer(text), key=key(9, sample)) for sample, text in enumerate(["a b c d", "a", "", "a b c"])]
    found = text_metrics(now, start, seed=0)
    assert found["answer_words"].value == 2.0
    assert found["answer_words_delta"].value == pytest.approx(2 / 3)
    assert found["answer_words_delta"].n == 3
    assert found["answer_tokens_delta"].value == 0.0
    assert "distinct_1_delta" not in found
    assert "answer_words_delta" not in text_metrics(now, [], seed=0)


def test_intervals_are_over_questions() -> None:
    long, short = "a " * 50, "a"
    answers = [
        replace(answer(text), key=AnswerKey(step=1, question_id=name, paraphrase=0, sample=sample))
        for name, text in (("q", long), ("r", short))
        for sample in range(40)
    ]
    found = text_metrics(answers, None, seed=0)["answer_words"]
    assert (found.low, found.high) == (1.0, 50.0), "with two questions, either may be drawn twice"


def key(step: int, sample: int) -> AnswerKey:
    return AnswerKey(step=step, question_id="q", paraphrase=0, sample=sample)
