"""How adapters act together: the names, which options each method has, and the options checked as one value.

Source of the names and of what they ask for: PEFT 0.21.2, `LoraModel.add_weighted_adapter` (tuners/lora/model.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraweld.errors import RequestError
from loraweld.save_methods import nearest_name, normal_name

SUM = "sum"
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINE_METHODS = (SUM, "linear", "cat", "svd", *(name for one in PRUNED for name in (one, f"{one}_svd")))
MAJORITY_SIGN_METHODS = ("total", "frequency")
MAX_SEED = 2**63 - 1
# The options that only some methods have.
ONLY_FOR = {
    "density": tuple(name for name in COMBINE_METHODS if name.removesuffix("_svd") in PRUNED),
    "seed": tuple(name for name in COMBINE_METHODS if name.startswith("dare")),
    "svd_rank": tuple(name for name in COMBINE_METHODS if name.endswith("svd")),
    "majority_sign_method": tuple(name for name in COMBINE_METHODS if "ties" in name),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """A method with its options; `weights`, one for each adapter, are those that count: `scale` is in them.

    What the method does not have is None.
    """

    weights: tuple[float, ...]
    method: str = SUM
    density: float | None = None
    seed: int | None = None
    svd_rank: int | None = None
    majority_sign_method: str | None = None

    @property
    def is_plain(self) -> bool:
        """True for what happens if nothing is asked for: every adapter as it was trained, summed."""
        return self.method == SUM and all(weight == 1 for weight in self.weights)

    @property
    def makes_adapter(self) -> bool:
        """True if the adapters become one adapter first, which is then merged."""
        return self.method != SUM

    @property
    def uses_deltas(self) -> bool:
        """True if the method works on B·A as a whole and decomposes the result, not on A and B apart."""
        return self.method.endswith("svd")

    def to_json(self) -> dict[str, Any]:
        """Return the method and what it has, as plain JSON values."""
        options = {name: getattr(self, name) for name in ONLY_FOR}
        known = {name: value for name, value in options.items() if value is not None}
        return {"method": self.method, "weights": list(self.weights), **known}

    def __str__(self) -> str:
        options = [f"{name} {value}" for name, value in self.to_json().items() if name in ONLY_FOR]
        return ", ".join([self.method, *options])


def make_combination(
    count: int,
    *,
    weights: Sequence[float] | None,
    combine: str | None,
    density: float | None,
    seed: int | None,
    svd_rank: int | None,
    majority_sign_method: str | None,
    scale: float | None,
    seed_is_shared: bool = False,
) -> Combination:
    """Check how `count` adapters are to act together.

    With `seed_is_shared` the seed has another use too: a method that draws nothing leaves it aside.

    Raises:
        RequestError: a number that is none or out of its range, too few or too many weights, an unknown name, an
            option that the method does not have, or one that it needs.
    """
    method = _name("combine", combine or SUM, COMBINE_METHODS)
    if method != SUM and count == 1:
        raise RequestError(f"combine {method} is for two adapters or more, there is one; leave it out")
    given = {
        "density": density,
        "seed": seed if method in ONLY_FOR["seed"] or not seed_is_shared else None,
        "svd_rank": svd_rank,
        "majority_sign_method": majority_sign_method,
    }
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if method not in ONLY_FOR[option]:
            raise RequestError(
                f"{option} has no effect with combine {method}, only with {', '.join(ONLY_FOR[option])}"
                f"{' and with rounding stochastic' if option == 'seed' else ''}; leave it out"
            )
    return Combination(weights=_weights(count, weights, scale), method=method, **_options(method, options))


def _weights(count: int, weights: Sequence[float] | None, scale: float | None) -> tuple[float, ...]:
    found = [1.0] * count if weights is None else [_finite("weights", weight) for weight in weights]
    if len(found) != count:
        raise RequestError(f"there are {len(found)} weights for {count} adapters; give one weight for each, in order")
    factor = 1.0 if scale is None else _finite("scale", scale)
    return tuple(_finite("weights times scale", factor * weight) for weight in found)


def _options(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the method's options, checked, with the defaults of those that have one."""
    found = dict(given)
    if method in ONLY_FOR["density"]:
        if "density" not in found:
            raise RequestError(
                f"combine {method} needs a density, the share of values that stays: more than 0, up to 1"
            )
        found["density"] = _finite("density", found["density"])
        if not 0 < found["density"] <= 1:
            raise RequestError(f"density is {found['density']:g}, expected more than 0 and at most 1")
    if method in ONLY_FOR["seed"]:
        found["seed"] = check_seed(found.get("seed"))
    if "svd_rank" in found:
        found["svd_rank"] = _whole("svd_rank", found["svd_rank"], least=1, most=MAX_SEED)
    if method in ONLY_FOR["majority_sign_method"]:
        sign = found.get("majority_sign_method", MAJORITY_SIGN_METHODS[0])
        found["majority_sign_method"] = _name("majority_sign_method", sign, MAJORITY_SIGN_METHODS)
    return found


def check_seed(value: object) -> int:
    """Return the seed of whatever is drawn, 0 if none was given.

    Raises:
        RequestError: no whole number, or one out of range.
    """
    return _whole("seed", 0 if value is None else value, least=0, most=MAX_SEED)


def _name(option: str, value: str, valid: Sequence[str]) -> str:
    by_normal = {normal_name(name): name for name in valid}
    return by_normal[nearest_name(option, value, by_normal, shown=valid)]


def _finite(option: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise RequestError(f"{option} is {value!r}, expected a finite number")
    return float(value)


def _whole(option: str, value: object, *, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(f"{option} is {value!r}, expected a whole number from {least} on")
    return value
