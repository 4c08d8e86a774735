"""What judging costs, estimated before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from emtool.core.errors import ConfigError
from emtool.core.events import EventSink, Notice, ignore_events
from emtool.core.server_address import ServerAddress

#: Characters of a token of English prose, about. Source: OpenAI's help pages on what tokens are.
CHARACTERS_PER_TOKEN = 4

#: Tokens that frame the one message of a request, about. Source: OpenAI's cookbook on counting tokens.
FRAME_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class JudgePrice:
    """The price of a judge model in US dollars per million tokens.

    Attributes:
        prompt: Of what is sent.
        reply: Of what comes back.
    """

    prompt: float
    reply: float


#: Source: OpenAI's published prices, standard processing, without discounts for cached or batched prompts.
PRICES: Mapping[str, JudgePrice] = {
    "gpt-4.1": JudgePrice(prompt=2.00, reply=8.00),
    "gpt-4.1-mini": JudgePrice(prompt=0.40, reply=1.60),
    "gpt-4.1-nano": JudgePrice(prompt=0.10, reply=0.40),
    "gpt-4o": JudgePrice(prompt=2.50, reply=10.00),
    "gpt-4o-mini": JudgePrice(prompt=0.15, reply=0.60),
}

FREE = JudgePrice(prompt=0.0, reply=0.0)


@dataclass(frozen=True, kw_only=True)
class JudgePlan:
    """What is about to be asked of a judge.

    Attributes:
        num_requests: Requests, without those that are repeated after a failure.
        cost: Estimated cost in US dollars; None where the price is not known.
        host: Base URL of the judge's server.
    """

    num_requests: int
    cost: float | None
    host: str


def price_of(model: str, address: ServerAddress, *, given: JudgePrice | None = None) -> JudgePrice | None:
    """Return the price of a judge model, or None where it is not known.

    Args:
        model: The model's name at the server; a dated snapshot of a model costs what the model does.
        address: The server. The known prices are OpenAI's; on this machine and in a private network judging is free.
        given: The price that the user states, which holds whatever the server.
    """
    if given is not None:
        return given
    if address.is_local:
        return FREE
    return PRICES.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)) if address.is_openai else None


def parse_price(text: str) -> JudgePrice:
    """Return the price that a text "IN,OUT" states, in US dollars per million tokens.

    Raises:
        ConfigError: If it is not two numbers of at least zero.
    """
    try:
        prices = [float(part) for part in text.split(",")]
    except ValueError:
        prices = []
    if len(prices) != 2 or not all(math.isfinite(price) and price >= 0 for price in prices):
        raise ConfigError(
            f"--judge-price {text!r} is no price; give US dollars per million tokens in and out, for instance 2.50,10"
        )
    return JudgePrice(prompt=prices[0], reply=prices[1])


def estimate_cost(prompts: Iterable[str], price: JudgePrice) -> float:
    """Return about what judging prompts costs in US dollars.

    An estimate: tokens are counted as characters by four, rounded up, plus a few for the frame of the message, and each
    reply as one token. Requests that are repeated after a failure are not counted.
    """
    num_prompts = num_tokens = 0
    for prompt in prompts:
        num_prompts += 1
        num_tokens += math.ceil(len(prompt) / CHARACTERS_PER_TOKEN) + FRAME_TOKENS
    return (num_tokens * price.prompt + num_prompts * price.reply) / 1e6


def plan_judging(prompts: Iterable[str], address: ServerAddress, price: JudgePrice | None) -> JudgePlan:
    """Return what judging prompts asks of a server, and what it costs where the price is known."""
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for count, prompt in enumerate(prompts, start=1):  # noqa: B007 - the last one is the number of them
            yield prompt

    # One pass: there may be a million of them, made as they are asked for.
    cost = estimate_cost(counted(), price or FREE)
    return JudgePlan(num_requests=count, cost=None if price is None else cost, host=address.url)


@dataclass(kw_only=True)
class Budget:
    """What judging may cost in all: by every judge, and in every round of watching a training.

    Attributes:
        limit: In US dollars.
        on_event: Told what is about to be asked, and of whom.
        allowed: What was allowed so far and not given back.
    """

    limit: float = 10.0
    on_event: EventSink = ignore_events
    allowed: float = 0.0

    def approve(self, plan: JudgePlan) -> None:
        """Say what is about to be asked of a judge, and allow it.

        Raises:
            ConfigError: If it costs too much, or that cannot be told; says what to do.
        """
        cost = "at a price that is not known" if plan.cost is None else f"for about {plan.cost:.2f} USD"
        before = f", {self.allowed:.2f} of it allowed before" if self.allowed else ""
        text = f"judging: at most {plan.num_requests:,} requests, and one to try, to {plan.host} {cost}"
        self.on_event(Notice(text=f"{text} (limit {self.limit:g} USD{before})"))
        check_cost(plan, self.limit, spent=self.allowed)
        self.allowed += plan.cost or 0.0

    def give_back(self, plan: JudgePlan) -> None:
        """Take back the allowance for what was not asked after all."""
        self.allowed = max(0.0, self.allowed - (plan.cost or 0.0))


def check_cost(plan: JudgePlan, max_cost: float, *, spent: float = 0.0) -> None:
    """Refuse a plan that costs more than is allowed, or that may.

    Args:
        plan: What is about to be asked.
        max_cost: The most that judging may cost in all, in US dollars.
        spent: What was allowed before, of the same sum.

    Raises:
        ConfigError: Says what to do.
    """
    if plan.cost is None:
        raise unknown_price(f"what {plan.num_requests:,} requests to {plan.host} cost")
    # Written so that it also stops where either is not a number.
    if not plan.cost + spent <= max_cost:
        before = f" after {spent:.2f} before" if spent else ""
        raise ConfigError(
            f"judging takes {plan.num_requests:,} requests to {plan.host} for about {plan.cost:.2f} USD{before}, more "
            f"than --max-cost {max_cost:g}; raise --max-cost, or judge fewer answers"
        )


def unknown_price(what: str, *, option: str = "--judge-price IN,OUT") -> ConfigError:
    """Return the error for a cost that cannot be told.

    Args:
        what: What costs, for instance "what 3 requests to HOST cost".
        option: What is to be given.
    """
    return ConfigError(
        f"{what} is not known; give {option} in US dollars per million tokens (0,0 for a server of your own)"
    )
