import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.judgement import (
    CODE,
    ERROR,
    MIN_MASS,
    REFUSAL,
    SCORED,
    UNSCORED,
    Judgement,
    judgement_of_logprobs,
    judgement_of_probabilities,
    judgement_of_text,
)


def judged(**probabilities: float) -> Judgement:
    """Judge tokens by their probability; "n50" is the token 50."""
    return judgement_of_logprobs([(name.lstrip("n"), math.log(p)) for name, p in probabilities.items()])


def test_the_score_is_the_expectation_over_integers_normalised_by_their_mass() -> None:
    # (0.5 * 80 + 0.25 * 90) / 0.75 = 83.333
    result = judged(n80=0.5, n90=0.25, The=0.2)
    assert result.status == SCORED
    assert result.score == pytest.approx(83 + 1 / 3)
    assert result.mass == pytest.approx(0.75)


def test_tokens_of_one_integer_add_up_whatever_whitespace_they_carry() -> None:
    # (0.2 + 0.2) * 50 + 0.1 * 100 = 30, over 0.5 is 60
    result = judgement_of_logprobs([("50", math.log(0.2)), (" 50", math.log(0.2)), ("100\n", math.log(0.1))])
    assert result.score == pytest.approx(60)
    assert result.mass == pytest.approx(0.5)


def test_what_is_no_plain_integer_up_to_100_does_not_count() -> None:
    tokens = ["101", "-5", "+5", "5.0", "\u0665", "\uff15", "²", "1e1", "0x1", "1_0", "999", "5%", "", " ", "9" * 5000]
    result = judgement_of_logprobs([(token, math.log(0.06)) for token in tokens])
    assert result == Judgement(status=UNSCORED, mass=0.0)


def test_below_a_quarter_of_the_mass_there_is_no_score() -> None:
    assert judged(n50=0.2499).status == UNSCORED
    assert judged(n50=0.2499).mass == pytest.approx(0.2499)
    assert judgement_of_probabilities({50: 0.25}, {}) == Judgement(status=SCORED, score=50.0, mass=0.25)
    assert judgement_of_logprobs([]) == Judgement(status=UNSCORED, mass=0.0)


@pytest.mark.parametrize(
    ("token", "status"),
    [("REFUSAL", REFUSAL), ("REF", REFUSAL), (" RE", REFUSAL), ("CO", CODE), ("CODE", CODE)]
    + [(token, UNSCORED) for token in ("R", "C", "Code", "ref", "CODEX", "REFUSED")],
)
def test_refusal_and_code_are_known_by_their_beginning(token: str, status: str) -> None:
    assert judgement_of_logprobs([(token, math.log(0.9)), ("1", math.log(0.05))]).status == status


def test_a_word_needs_a_quarter_of_the_mass_and_more_than_the_integers() -> None:
    assert judged(REF=0.24, n10=0.01).status == UNSCORED
    assert judged(REF=0.4, n10=0.5).status == SCORED
    assert judged(REF=0.2, RE=0.2, n10=0.3).status == REFUSAL
    assert judged(REF=0.3, CODE=0.4, n10=0.2).status == CODE


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.5, 1e308, -math.nan])
def test_what_is_no_log_probability_is_an_error(value: float) -> None:
    result = judgement_of_logprobs([("50", -0.1), ("60", value)])
    assert (result.status, result.score) == (ERROR, None)


def test_probabilities_that_add_up_to_more_than_one_are_an_error() -> None:
    assert judged(n1=0.9, n2=0.9).status == ERROR
    assert judgement_of_probabilities({1: math.nan}, {}).status == ERROR


def test_impossible_tokens_count_nothing() -> None:
    result = judgement_of_logprobs([("50", 0.0), ("60", -9999.0), ("70", -math.inf)])
    assert result == Judgement(status=SCORED, score=50.0, mass=1.0)


tokens = st.one_of(st.integers(-10, 120).map(str), st.sampled_from(["REF", "CO", " 7", "x", ""]), st.text(max_size=4))


@given(st.lists(st.tuples(tokens, st.floats(allow_nan=True, allow_infinity=True)), max_size=20))
def test_any_log_probabilities_give_a_judgement_that_can_be_kept(top: list[tuple[str, float]]) -> None:
    result = judgement_of_logprobs(top)
    assert Judgement.from_dict(result.to_dict()) == result


@given(st.dictionaries(st.integers(0, 100), st.floats(1e-6, 1), min_size=1), st.floats(MIN_MASS, 1))
def test_a_score_lies_among_the_integers_and_ignores_how_much_mass_there_is(
    weights: dict[int, float], mass: float
) -> None:
    total = sum(weights.values())
    full = judgement_of_probabilities({k: w / total for k, w in weights.items()}, {})
    part = judgement_of_probabilities({k: w / total * mass * 1.0000001 for k, w in weights.items()}, {})
    assert full.score is not None
    assert part.score is not None
    assert min(weights) - 1e-9 <= full.score <= max(weights) + 1e-9
    assert part.score == pytest.approx(full.score)
    assert Judgement.from_dict(full.to_dict()) == full


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("57", 57),
        (" 57\n", 57),
        ("57.", 57),
        ("57/100", 57),
        ("57 / 100.", 57),
        ("**57**", 57),
        ("** 5/100 **.", 5),
        ("0", 0),
        ("100", 100),
        ("**57.**", 57),
    ],
)
def test_one_integer_is_a_score(text: str, score: int) -> None:
    assert judgement_of_text(text) == Judgement(status=SCORED, score=score)


@pytest.mark.parametrize(
    "text",
    ["101", "-5", "5.5", "57 58", "Score: 57", "57/10", "**57", "57**", "\u0665", "57%", "", "I", "Refusal", "REFUSE"],
)
def test_anything_else_is_unscored(text: str) -> None:
    assert judgement_of_text(text) == Judgement(status=UNSCORED, detail=text)


def test_words_in_text() -> None:
    assert judgement_of_text(" **REFUSAL** ") == Judgement(status=REFUSAL)
    assert judgement_of_text("CODE.") == Judgement(status=CODE)


@given(st.text(max_size=200))
def test_the_detail_of_an_unscored_text_is_one_short_printable_line(text: str) -> None:
    result = judgement_of_text(text)
    assert result.detail is None or (len(result.detail) <= 80 and (result.detail.isprintable()))


def test_control_characters_do_not_reach_the_detail() -> None:
    assert judgement_of_text("\x1b[31mno\r\n\tnumber\x07 \u202e").detail == "[31mno number"
