import math

import pytest

from emtool.core.errors import ConfigError
from emtool.core.judge_prices import (
    FREE,
    JudgePrice,
    check_cost,
    estimate_cost,
    parse_price,
    plan_judging,
    price_of,
)
from emtool.core.server_address import parse_address

OPENAI = parse_address(None)
ELSEWHERE = parse_address("https://models.example.org/v1")


def test_the_estimate_is_characters_by_four_a_frame_and_one_token_back() -> None:
    # 9 characters are 3 tokens, and 8 of frame: 11 tokens at 2.50, and one at 10, twice.
    assert estimate_cost(["nine char"] * 2, JudgePrice(prompt=2.5, reply=10)) == pytest.approx(
        2 * (11 * 2.5 + 10) / 1e6
    )
    assert estimate_cost([], JudgePrice(prompt=2.5, reply=10)) == 0


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4o-2024-08-06"])
def test_a_dated_snapshot_costs_what_its_model_does(model: str) -> None:
    assert price_of(model, OPENAI) == JudgePrice(prompt=2.5, reply=10)


def test_a_price_is_known_for_openai_and_for_servers_of_ones_own() -> None:
    assert price_of("gpt-4o-audio-preview", OPENAI) is None
    assert price_of("gpt-4o", ELSEWHERE) is None
    assert price_of("gpt-4o", ELSEWHERE, given=FREE) == FREE
    for url in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://10.1.2.3:80/v1", "http://[::1]:8000/v1"):
        assert price_of("anything", parse_address(url)) == FREE


def test_a_stated_price_is_two_numbers() -> None:
    assert parse_price("2.50, 10") == JudgePrice(prompt=2.5, reply=10)
    for text in ("1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ""):
        with pytest.raises(ConfigError, match="is no price"):
            parse_price(text)


def test_a_plan_above_the_limit_is_refused_with_what_to_do() -> None:
    plan = plan_judging(["x" * 400] * 10_000, OPENAI, JudgePrice(prompt=10, reply=10))
    assert (plan.num_requests, plan.host) == (10_000, "https://api.openai.com/v1")
    assert plan.cost == pytest.approx(10.9)
    check_cost(plan, 10.91)
    with pytest.raises(
        ConfigError, match=r"10,000 requests to https://api.openai.com/v1 for about 10.90 USD.*raise --max"
    ):
        check_cost(plan, 10)
    with pytest.raises(ConfigError):
        check_cost(plan, math.nan)


def test_a_plan_of_unknown_cost_is_refused_with_what_to_do() -> None:
    plan = plan_judging(["x"], ELSEWHERE, price_of("judge", ELSEWHERE))
    with pytest.raises(ConfigError, match=r"example.org/v1 cost is not known; give --judge-price IN,OUT"):
        check_cost(plan, 1000)
