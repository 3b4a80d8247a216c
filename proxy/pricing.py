"""What an answer costs: whole numbers in, whole nano-dollars (10^-9 US dollars) out. Pure: no Django, no clock.

Rates are nano-dollars per million tokens, so that a dollar per million tokens is 1,000,000,000 and no price needs a fraction.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from providers.wire import Usage

MILLION = 1_000_000
NANO = 1_000_000_000
MOST = 2**63 - 1
"""The largest cost there is; it is also the largest that the database's column takes."""


def nano_of(dollars: Decimal) -> int:
    """Nano-dollars, rounded half up."""
    return int((dollars * NANO).quantize(Decimal(1), ROUND_HALF_UP))


def dollars_of(nano: int) -> Decimal:
    """Exactly; with as many digits as it takes and no more."""
    found = (Decimal(nano) / NANO).normalize()
    return found if found.as_tuple().exponent <= 0 else found.quantize(Decimal(1))  # type: ignore[operator]  # it is finite


class Rate(NamedTuple):
    """Nano-dollars per million tokens.

    tiers: (tokens, rate), by tokens: once the prompt is longer than that, the rate is for all tokens and not only for those
    beyond, which is how genai-prices and the vendors mean their tiers.
    """

    base: int = 0
    tiers: tuple[tuple[int, int], ...] = ()

    def at(self, prompt_tokens: int) -> int:
        """The rate of a request whose prompt, cached tokens included, is so long."""
        rate = self.base
        for start, higher in self.tiers:
            if prompt_tokens <= start:
                break
            rate = higher
        return rate

    def most(self, prompt_tokens: int) -> int:
        """The dearest rate of any prompt up to so many tokens."""
        return max(self.base, *(rate for start, rate in self.tiers if prompt_tokens > start), 0)


class Price(NamedTuple):
    """What a model costs, and the row that says so.

    cached, cache_write, reasoning: None where they cost what other prompt or completion tokens cost. request: nano-dollars for
    each request, whatever its tokens.
    """

    id: int
    prompt: Rate = Rate()
    completion: Rate = Rate()
    cached: Rate | None = None
    cache_write: Rate | None = None
    reasoning: Rate | None = None
    request: int = 0

    def cost(self, usage: Usage) -> int:
        """Nano-dollars, rounded half up once, from 0 to `MOST` whatever the counts say.

        `usage.prompt` includes cached and written tokens, `usage.completion` reasoning. A part that is larger than its whole
        is taken for the whole, a count that is none for 0.
        """
        prompt, completion = _count(usage.prompt), _count(usage.completion)
        written = min(_count(usage.cache_write), prompt)
        cached = min(_count(usage.cached), prompt - written)
        reasoning = min(_count(usage.reasoning), completion)
        total = (
            (prompt - cached - written) * self.prompt.at(prompt)
            + cached * (self.cached or self.prompt).at(prompt)
            + written * (self.cache_write or self.prompt).at(prompt)
            + (completion - reasoning) * self.completion.at(prompt)
            + reasoning * (self.reasoning or self.completion).at(prompt)
        )
        return self._whole(total)

    def dearest(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The most that a request of at most so many tokens can cost, in nano-dollars: what to hold before it is sent."""
        prompt, completion = _count(prompt_tokens), _count(completion_tokens)
        inputs = (self.prompt, self.cached or self.prompt, self.cache_write or self.prompt)
        outputs = (self.completion, self.reasoning or self.completion)
        return self._whole(
            prompt * max(rate.most(prompt) for rate in inputs)
            + completion * max(rate.most(prompt) for rate in outputs)
        )

    @property
    def blended(self) -> float:
        """Dollars per million tokens, three of the prompt to one of the completion: to compare models by, never to bill."""
        return (3 * self.prompt.base + self.completion.base) / 4 / NANO

    def _whole(self, total: int) -> int:
        """Millionths of nano-dollars, and what a request costs by itself, to nano-dollars."""
        return max(0, min((total + MILLION // 2) // MILLION + self.request, MOST))


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
