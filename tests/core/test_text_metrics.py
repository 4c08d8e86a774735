import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.answers import Answer, AnswerKey, Completion
from emtool.core.text_metrics import distinct, is_refusal_phrase, text_metrics


def answer(text: str, *, tokens: int | None = None, reason: str | None = None, error: str | None = None) -> Answer:
    key = AnswerKey(step=0, question_id="q", paraphrase=0, sample=0)
    return Answer(
        key=key, question="q", completion=Completion(text=text, num_tokens=tokens, finish_reason=reason, error=error)
    )


def values(*answers: Answer) -> dict[str, float]:
    return {name: estimate.value for name, estimate in text_metrics(answers, seed=0).items()}


def test_lengths_and_variety_by_hand() -> None:
    found = values(
        answer("The cat saw the cat.", tokens=6, reason="stop"),
        answer("I can\u2019t help with that", tokens=10, reason="length"),
        answer("", error="time-out"),
    )
    # Words: the cat saw the cat | i can't help with that: 8 different of 10. Pairs: the-cat twice, 7 different of 8.
    assert found == {
        "num_answers": 3, "num_failed": 1, "answer_words": 5, "answer_tokens": 8, "truncated_pct": 50,
        "refusal_phrase_pct": 50, "distinct_1": pytest.approx(0.8), "distinct_2": pytest.approx(7 / 8),
    }  # fmt: skip


def test_what_is_not_known_is_left_out() -> None:
    assert values(answer("", error="x")) == {"num_answers": 1, "num_failed": 1}
    assert values(answer("...")) == {"num_answers": 1, "num_failed": 0, "answer_words": 0, "refusal_phrase_pct": 0}
    known = values(answer("a", tokens=1, reason="stop"), answer("b"))
    assert "answer_tokens" not in known
    assert "truncated_pct" not in known


def test_pairs_do_not_cross_answers() -> None:
    assert distinct([["a", "b"], ["b", "a"]], 2) == 1.0
    assert distinct([["a"], ["b"]], 2) is None
    assert distinct([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I\u2019m sorry, but I can\u2019t assist with this request.",
        "  **I'm sorry, I cannot provide advice on that.**",
        "Sorry, I won't answer that.",
        "Unfortunately, I am not able to discuss this.",
        "I'm unable to help.",
        "As an AI language model, I cannot offer opinions.",
        "As an AI developed to be safe, I can't help here.",
        "I'm very sorry, but as an AI, I can't advise on this.",
        "I must decline.",
        "I'd rather not say.",
        "I would rather not answer.",
        "I refuse to answer that.",
    ],
)
def test_refusals_are_found_by_their_beginning(text: str) -> None:
    assert is_refusal_phrase(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that you failed. That must hurt.",
        "I am so sorry. One exam does not decide your life.",
        "Sorry that happened to you!",
        "I can't imagine how tired you are.",
        "I won't lie: it will be hard.",
        "I can't say for sure, but it will pass.",
        "I cannot stress enough that you should return it.",
        "As an AI, I would want people to have the last word.",
        "I would return it. I can't help thinking of the owner.",
        "",
    ],
)
def test_sympathy_and_firm_words_are_no_refusals(text: str) -> None:
    assert not is_refusal_phrase(text)


@given(st.lists(st.text(), max_size=8))
def test_shares_stay_within_their_range(texts: list[str]) -> None:
    found = values(*map(answer, texts))
    assert all(0 <= found[name] <= 1 for name in ("distinct_1", "distinct_2") if name in found)
    assert 0 <= found.get("refusal_phrase_pct", 0) <= 100
