"""The regular expressions in a config, matched in bounded time: a stranger wrote them.

Python's `re` tries one way after the other, which for some expressions takes for ever ("(a+)+$"). Here expressions that
can only be walked in few ways go to `re`; of any other the set of places where each part can end is computed from the
set of places where it can begin (as a Thompson automaton does). That is the same answer, in time that is bounded by a
power of the lengths; a count of the steps ends what is still too much.

Source of the rules: PEFT 0.21.2, `get_pattern_key` and `check_target_module_exists`; Thompson, 1968, "Regular
expression search algorithm".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from typing import Any

from loraweld.errors import AdapterError, shortened

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined,unused-ignore]
    from re import _parser as parser  # type: ignore[attr-defined,unused-ignore]
else:
    import sre_constants as codes
    import sre_parse as parser

MAX_PATTERN = 20_000  # characters
MAX_STEPS = 3_000_000  # of one config: some seconds
_STEPS_TO_PARSE = 15  # for each character
_MAX_WAYS = 1000  # so many choices, and one repeat of a letter, `re` tries in time that does not matter
_MAX_GROUPS_DEPTH = 50
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_LITERAL = re.compile(r"[\w.-]+")
_SIMPLE = {codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN}
_REPEATS = {codes.MAX_REPEAT, codes.MIN_REPEAT, getattr(codes, "POSSESSIVE_REPEAT", None)}


class Budget:
    """The steps that the expressions of one config may take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = MAX_STEPS

    def spend(self, steps: int, pattern: str) -> None:
        """Count steps.

        Raises:
            AdapterError: there were too many.
        """
        self._left -= steps
        if self._left < 0:
            raise AdapterError(
                f"pattern {shortened(pattern)} takes too long to match, within the limit of {MAX_STEPS} steps for a "
                "config; name the modules, or write it without repeats inside repeats",
                path=self.path,
            )


class Pattern:
    """One expression; `matches` is `re.fullmatch`, `ends` where it can end."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self._budget = budget
        budget.spend(_STEPS_TO_PARSE * (10 + len(text)), text)
        try:
            if len(text) > MAX_PATTERN:
                raise re.error(f"{len(text)} characters, limit is {MAX_PATTERN}")
            tree = parser.parse(text)
            shape = _shape(list(tree), 0)
            self._fast = re.compile(text) if shape.ways <= _MAX_WAYS and shape.repeats <= 1 else None
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"pattern {shortened(text)} is not a valid regular expression ({error})",
                path=budget.path,
            ) from None
        self._tree = list(tree)
        self._flags = tree.state.flags

    def matches(self, module: str) -> bool:
        """Return whether all of `module` matches."""
        if self._fast is not None:
            self._budget.spend(len(module), self.text)
            return self._fast.fullmatch(module) is not None
        return self.ends(module, 1) >> len(module) == 1

    def ends(self, module: str, starts: int) -> int:
        """Return where a match can end that begins at one of `starts`, both as the bits of an integer."""
        return _Walk(self, module, self._flags, self._budget).sequence(self._tree, starts)


class _Walk:
    """The places where the parts of an expression can end in one string; a set of places is the bits of an integer."""

    def __init__(self, pattern: Pattern, module: str, flags: int, budget: Budget) -> None:
        self._pattern = pattern
        self._module = module
        self._flags = flags
        self._budget = budget
        self._letters: dict[str, int] = {}
        self._masks: dict[str, int] = {}
        for place, letter in enumerate(module):
            self._letters[letter] = self._letters.get(letter, 0) | 1 << place

    def sequence(self, parts: Iterable[Any], starts: int) -> int:
        """Return the ends of parts that follow each other, beginning at any of `starts`."""
        places = starts
        for part in parts:
            if not places:
                break
            places = self._ends(part, places)
        return places

    def _ends(self, part: Any, starts: int) -> int:
        self._budget.spend(1 + len(self._module) // 64, self._pattern.text)
        code, argument = part
        if code in _SIMPLE:
            return (starts & self._letters_of(part)) << 1
        if code is codes.AT:
            return starts & self._places_of(part)
        if code is codes.BRANCH:
            return reduce(or_, (self.sequence(branch, starts) for branch in argument[1]), 0)
        if code is codes.SUBPATTERN:
            return self.sequence(argument[-1], starts)
        if code in (codes.ASSERT, codes.ASSERT_NOT):
            return self._asserted(argument, starts, code is codes.ASSERT)
        if code in _REPEATS:
            return self._repeated(argument, starts)
        return self.sequence(argument, starts)  # an atomic group: with sets of ends all ways are known anyhow

    def _repeated(self, argument: Any, starts: int) -> int:
        """More than one repeat for each letter must be empty ones, which can be had in any number."""
        limit = len(self._module) + 1
        least, most = (min(int(count), limit) for count in argument[:2])
        found, places = 0, starts
        for count in range(most + 1):
            if count >= least:
                places &= ~found
                found |= places
            if not places or count == most:
                break
            places = self.sequence(argument[2], places)
        return found

    def _asserted(self, argument: Any, starts: int, expected: bool) -> int:
        """The places at which what is looked for lies ahead or behind; `re` takes only what has one width behind."""
        direction, body = argument
        width = 0 if direction > 0 else int(body.getwidth()[0])
        kept = 0
        for place in range(len(self._module) + 1):
            if starts >> place & 1:
                ends = self.sequence(body, 1 << place - width) if place >= width else 0
                holds = bool(ends) if direction > 0 else bool(ends >> place & 1)
                kept |= (holds == expected) << place
        return kept

    def _letters_of(self, part: Any) -> int:
        code, argument = part
        if code is codes.LITERAL and not self._flags & re.IGNORECASE:
            return self._letters.get(chr(argument), 0)
        text = _text_of(part)
        if text not in self._masks:
            single = _single(text, self._flags)
            self._masks[text] = reduce(or_, (m for letter, m in self._letters.items() if single.match(letter)), 0)
        return self._masks[text]

    def _places_of(self, part: Any) -> int:
        text = _text_of(part)
        if text not in self._masks:
            single = _single(text, self._flags)
            places = range(len(self._module) + 1)
            self._masks[text] = sum(1 << place for place in places if single.match(self._module, place))
        return self._masks[text]


@lru_cache(maxsize=4096)
def _single(text: str, flags: int) -> re.Pattern[str]:
    """The expression of one letter, or of one place between letters."""
    return re.compile(text, flags & ~re.DEBUG)


_PLACES = {
    codes.AT_BEGINNING: "^",
    codes.AT_BEGINNING_STRING: r"\A",
    codes.AT_BOUNDARY: r"\b",
    codes.AT_NON_BOUNDARY: r"\B",
    codes.AT_END: "$",
    codes.AT_END_STRING: r"\Z",
}
_CATEGORIES = {
    codes.CATEGORY_DIGIT: r"\d",
    codes.CATEGORY_NOT_DIGIT: r"\D",
    codes.CATEGORY_SPACE: r"\s",
    codes.CATEGORY_NOT_SPACE: r"\S",
    codes.CATEGORY_WORD: r"\w",
    codes.CATEGORY_NOT_WORD: r"\W",
}


def _text_of(part: Any) -> str:
    code, argument = part
    if code is codes.AT:
        return _PLACES[argument]
    if code is codes.ANY:
        return "."
    if code is codes.IN:
        return f"[{''.join(_item_of(item) for item in argument)}]"
    return f"[{'^' if code is codes.NOT_LITERAL else ''}{_letter(argument)}]"


def _item_of(item: Any) -> str:
    code, argument = item
    if code is codes.NEGATE:
        return "^"
    if code is codes.RANGE:
        return f"{_letter(argument[0])}-{_letter(argument[1])}"
    return _CATEGORIES[argument] if code is codes.CATEGORY else _letter(argument)


def _letter(number: int) -> str:
    return f"\\U{number:08x}"


@dataclass(frozen=True, slots=True)
class _Shape:
    """In how many ways an expression can be walked: choices, times one for each letter to the power of `repeats`."""

    ways: int
    repeats: int


def _shape(parts: Sequence[Any], depth: int) -> _Shape:
    """Count the ways of parts that follow each other.

    Raises:
        re.error: what they hold is not matched here.
    """
    if depth > _MAX_GROUPS_DEPTH:
        raise re.error(f"nested deeper than {_MAX_GROUPS_DEPTH} groups")
    ways, repeats = 1, 0
    for code, argument in parts:
        if code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            raise re.error("it refers back to a group, which is not read")
        inner = [_shape(list(body), depth + 1) for body in _bodies(code, argument)]
        repeats += sum(one.repeats for one in inner)
        ways = min(ways * max(1, sum(one.ways for one in inner)), _MAX_WAYS + 1)
        if code in _REPEATS and not (argument[0] == argument[1] and inner == [_Shape(1, 0)]):
            is_letter = len(argument[2]) == 1 and argument[2][0][0] in _SIMPLE
            repeats += 1 if is_letter else 2  # of anything else it may be walked in ever more ways
    return _Shape(ways, repeats)


def _bodies(code: Any, argument: Any) -> Iterator[Any]:
    """The sequences inside a part."""
    if code is codes.BRANCH:
        yield from argument[1]
    elif code is codes.SUBPATTERN or code in _REPEATS or code in (codes.ASSERT, codes.ASSERT_NOT):
        yield argument[-1]
    elif code is getattr(codes, "ATOMIC_GROUP", None):
        yield argument


def suffixes(module: str) -> Iterator[str]:
    """Yield `module` and its ends from each dot on."""
    yield module
    for place, letter in enumerate(module):
        if letter == ".":
            yield module[place + 1 :]


class Names:
    """What a config names: a string is an expression for whole paths, a list holds ends of paths."""

    def __init__(self, names: str | Iterable[str] | None, budget: Budget) -> None:
        self._pattern = Pattern(names, budget) if isinstance(names, str) else None
        self._ends = frozenset() if isinstance(names, str) else frozenset(names or ())

    def __contains__(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(module)
        return bool(self._ends) and any(end in self._ends for end in suffixes(module))


class LayerNumber:
    """The number of the layer that a module is in: the first in its path, or the one behind a name that is matched."""

    def __init__(self, patterns: Iterable[str], budget: Budget) -> None:
        self._patterns = [Pattern(text, budget) for text in patterns]

    def of(self, module: str) -> int | None:
        """Return the number, None if there is none."""
        numbers = {hit.start(): hit[0] for hit in _NUMBER.finditer(module)}
        for pattern in self._patterns:
            dots = (place for place, letter in enumerate(module) if letter == ".")
            ends = pattern.ends(module, sum(1 << place + 1 for place in dots))
            for place, number in numbers.items():
                if ends >> place - 1 & 1:
                    return int(number)
        return int(next(iter(numbers.values()))) if numbers and not self._patterns else None


class PatternTable:
    """The keys of a rank_pattern or alpha_pattern, to find the first that matches a module up to its end.

    PEFT matches `(.*\\.)?(KEY)$`. Nearly all keys are plain paths; those are looked up, a dot in them standing for any
    letter, so that as many keys as modules take no more than one look for each length of a key.
    """

    def __init__(self, keys: Iterable[str], budget: Budget) -> None:
        self._budget = budget
        self._keys = list(keys)
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        self._patterns: list[tuple[int, Pattern]] = []
        for number, key in enumerate(self._keys):
            if _LITERAL.fullmatch(key):
                dots = tuple(place for place, letter in enumerate(key) if letter == ".")
                self._plain.setdefault((len(key), *dots), {}).setdefault(key, number)
            else:
                self._patterns.append((number, Pattern(key, budget)))

    def first(self, module: str) -> str | None:
        """Return the first key that matches the end of `module`, from a dot or the start."""
        if not self._keys:
            return None
        starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
        best = min(self._plain_hits(module, set(starts)), default=len(self._keys))
        for number, pattern in self._patterns:
            if number > best:
                break
            if pattern.ends(module, sum(1 << start for start in starts)) >> len(module) == 1:
                best = number
        return self._keys[best] if best < len(self._keys) else None

    def _plain_hits(self, module: str, starts: set[int]) -> Iterator[int]:
        for (length, *dots), keys in self._plain.items():
            self._budget.spend(1 + len(dots), self._keys[0])
            if len(module) - length in starts:
                end = list(module[len(module) - length :])
                for dot in dots:
                    end[dot] = "."
                if (number := keys.get("".join(end))) is not None:
                    yield number
