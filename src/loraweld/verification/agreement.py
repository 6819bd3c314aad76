"""How far the logits of two models agree on prompts: values for programs, a table for people, what is near enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraweld.errors import printable

# A millionth of a nat: what the order of float32 sums may make of equal weights, in models of many layers.
ARITHMETIC = 1e-6
# Divergence grows with the square of a difference: a change that is missing leaves all of the base's, one at 2/3 or 4/3
# of its scale a ninth of it.
SHARE = 0.1
_SHOWN = 40  # prompts
_WIDTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A merged model beside base + adapter, at each position of a prompt, or of all prompts.

    `kl_mean`, `kl_max`: KL(base + adapter ‖ merged) of the next token's distribution, in nats. `top1`: share of the
    positions at which both hold the same token for the most probable. `logit_difference`: the largest between two
    logits. `adapter_kl_mean`: KL(base + adapter ‖ base), what the adapter does. `base_kl_mean`: KL(base ‖ merged).
    """

    prompt: str
    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    logit_difference: float
    adapter_kl_mean: float
    base_kl_mean: float


def combined(parts: Sequence[Agreement]) -> Agreement:
    """Return the agreement over all positions of all prompts."""
    tokens = sum(part.tokens for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.tokens for part in parts) / tokens)

    return Agreement(
        prompt="all",
        tokens=tokens,
        kl_mean=mean("kl_mean"),
        kl_max=_largest([part.kl_max for part in parts]),
        top1=mean("top1"),
        logit_difference=_largest([part.logit_difference for part in parts]),
        adapter_kl_mean=mean("adapter_kl_mean"),
        base_kl_mean=mean("base_kl_mean"),
    )


def _largest(values: Sequence[float]) -> float:
    """NaN if any is: `max` would pass over it."""
    return next((value for value in values if value != value), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """The outcome of running base + adapter and the merged model on prompts; `in_codes`: the merged model is quantised.

    A model in plain weights behaves as base + adapter if it is much nearer to it than the base is: `limit` is a tenth
    of the base's mean divergence. The steps of codes may be larger than the change, so a model in codes is asked less:
    to be nearer to base + adapter than to the base. What float32 arithmetic makes of equal weights is never too much.
    """

    total: Agreement
    prompts: tuple[Agreement, ...]
    in_codes: bool

    @property
    def limit(self) -> float:
        """The largest mean divergence that is near enough."""
        return max(ARITHMETIC, self.total.base_kl_mean if self.in_codes else SHARE * self.total.adapter_kl_mean)

    @property
    def holds(self) -> bool:
        """Whether the model behaves as base + adapter; not if a logit is no number."""
        return self.total.kl_mean <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain JSON values."""
        return {
            **{name: value for name, value in asdict(self.total).items() if name != "prompt"},
            "limit": self.limit,
            "holds": self.holds,
            "prompts": [asdict(prompt) for prompt in self.prompts],
        }

    def lines(self) -> list[str]:
        """Return a table for a person."""
        shown = self.prompts[:_SHOWN]
        more = [f"  … and {len(self.prompts) - _SHOWN} more prompts"] if len(self.prompts) > _SHOWN else []
        heads = ("tokens", "KL mean", "KL max", "top-1", "logits", "of base", "from base")
        return [
            f"behaviour on {len(self.prompts)} prompts, KL from base + adapter in nats a token:",
            f"  {'':{_WIDTH}} {' '.join(f'{head:>10}' for head in heads)}",
            *(_row(agreement) for agreement in shown),
            *more,
            _row(self.total),
            *self._notes(),
        ]

    def _notes(self) -> list[str]:
        if self.total.adapter_kl_mean > ARITHMETIC / SHARE:
            return []
        return ["note: these prompts do not show the adapter: the base alone says the same; choose some of its topic"]

    def __str__(self) -> str:
        near = "its KL from the base" if self.in_codes else "a tenth of what the base alone has"
        return (
            f"KL from base + adapter is {self.total.kl_mean:.2e} nats a token, expected at most {self.limit:.2e} "
            f"({near}): the change is missing in parts, of another scale, or smaller than the steps of what is stored"
        )


def _row(one: Agreement) -> str:
    prompt = printable(one.prompt).replace("\n", " ")
    name = prompt if len(prompt) <= _WIDTH else f"{prompt[: _WIDTH - 1]}…"
    numbers = (
        f"{one.tokens}",
        f"{one.kl_mean:.2e}",
        f"{one.kl_max:.2e}",
        f"{one.top1:.1%}",
        f"{one.logit_difference:.2e}",
        f"{one.adapter_kl_mean:.2e}",
        f"{one.base_kl_mean:.2e}",
    )
    return f"  {name:{_WIDTH}} {' '.join(f'{number:>10}' for number in numbers)}"
