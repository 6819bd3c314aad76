"""Prove an output: open, plan what it should be, compare every tensor, report. Here is the order of the steps."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.hub import locate_base
from loraweld.checkpoint.reader import Reader
from loraweld.checkpoint.stored import StoredTensor
from loraweld.checkpoint.url import is_url
from loraweld.dtypes import is_plain_float
from loraweld.errors import CheckpointError, NumericsError, RequestError
from loraweld.naming.names import Names
from loraweld.naming.tied import known_ties
from loraweld.planning.merge_plan import Recipe
from loraweld.request import PathLike
from loraweld.verification.behaviour import Trial, check_packages, prepare_trial, run_trial
from loraweld.verification.checksums import damaged
from loraweld.verification.consistency import consistency
from loraweld.verification.diagnosis import Candidate
from loraweld.verification.findings import Finding, TensorResult, VerifyReport, lost_change_warnings
from loraweld.verification.intended import Intended, intend
from loraweld.verification.opened import Opened, open_output
from loraweld.verification.prompts import read_prompts
from loraweld.verification.values import Checker

Progress = Callable[[int], None]
# Tables that a model's code makes anew: some tools write them, some do not.
_BUFFER = re.compile(r"\b(inv_freq|position_ids|token_type_ids|masked_bias)$|\battn\.(attention\.)?bias$")
_MOST_CANDIDATES = 64


def verify(
    output: PathLike,
    *,
    base: PathLike | None = None,
    adapter: PathLike | Sequence[PathLike] = (),
    sample: float = 1.0,
    behaviour: PathLike | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> VerifyReport:
    """Read a merged model again and compare all of it with base + adapters, evaluated anew in float64.

    Args:
        output: the folder of a merged model, made by any tool; or its URL.
        base: a folder, a Hub id or a URL; None takes the one of loraweld.json if it is of the Hub, else the one that
            the adapter's config names.
        adapter: the adapter that was merged, or several, in order.
        sample: share of the rows of each tensor to look at, more than 0, at most 1; always the same ones.
        behaviour: a text file with one prompt a line: base + adapter and the model are run on them too, in float32 on
            the CPU, by PEFT and transformers (`pip install 'loraweld[peft]'`), and their logits compared.
        progress: called with the number of bytes that were compared.
        options: how the adapters were merged, where that is not in loraweld.json: `weights`, `scale`, `combine`,
            `merge_base`, `expert_layout`, `tokenizer`, … as for `merge`.

    Raises:
        LoraweldError: there is no model, base and adapter do not fit each other, or cannot be run. What is wrong with
            the output itself is in the report.
    """
    started = time.monotonic()
    check_sample(sample)
    prompts = _prompts(behaviour)
    adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    located = locate_base(os.fspath(output)) if is_url(os.fspath(output)) else None
    folder = located.folder if located else Path(output)
    opened, intended = open_sides(folder, base=base, adapters=adapters, options=options)
    trial = prepare_trial(opened, intended, prompts) if prompts else None
    report = verify_opened(opened, intended, sample=sample, progress=progress, started=started)
    report = _tried(report, trial, started) if trial else report
    return replace(report, output=located.label) if located else report


def open_sides(
    folder: Path,
    *,
    base: PathLike | None,
    adapters: Sequence[PathLike],
    options: Mapping[str, Any],
) -> tuple[Opened, Intended]:
    """Open an output, with what is wrong with its files and inputs as findings, and plan what it should be.

    Raises:
        LoraweldError: there is no model, or base and adapters do not fit each other.
    """
    opened = open_output(folder)
    try:
        intended, findings = intend(opened, base=base, adapters=adapters, options=options)
    except OSError as error:
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None
    opened.findings += findings
    return opened, intended


def _prompts(path: PathLike | None) -> list[str]:
    if path is None:
        return []
    check_packages()
    return read_prompts(Path(path))


def _tried(report: VerifyReport, trial: Trial, started: float) -> VerifyReport:
    found, wrong = run_trial(trial)
    seconds = time.monotonic() - started
    return replace(report, behaviour=found, findings=(*report.findings, *wrong), seconds=seconds)


def check_sample(sample: float) -> None:
    """Raises:
    RequestError: not a share.
    """
    if not 0 < sample <= 1:
        raise RequestError(f"sample is {sample:g}, expected a share of the rows, above 0 and up to 1, such as 0.1")


def verify_opened(
    opened: Opened, intended: Intended, *, sample: float, progress: Progress | None, started: float
) -> VerifyReport:
    """Compare an open output with what it should be."""
    run = _Verification(opened, intended, sample, progress or (lambda count: None))
    try:
        run.tensors()
        changed_since = [*damaged(opened, run.reader)] if sample == 1 else []  # which takes all bytes
    finally:
        run.reader.close()
    findings = [
        *opened.findings,
        *consistency(opened, intended.config, intended.base.folder),
        *run.findings,
        *changed_since,
    ]
    return VerifyReport(
        output=opened.folder,
        base=intended.base.label,
        adapters=tuple(adapter.label for adapter in intended.facts.given),
        sample=sample,
        findings=tuple(findings),
        notes=(*_notes(run.results), *lost_change_warnings(run.results)),
        tensors=tuple(run.results),
        equal=run.equal,
        seconds=time.monotonic() - started,
    )


def _notes(results: Iterable[TensorResult]) -> list[str]:
    results = list(results)
    why = {
        "twice": "the change before the sum, as PEFT does with safe_merge=True and on embeddings",
        "after each adapter": "as PEFT does with several adapters",
    }
    found = {name: [result for result in results if result.rounded == name] for name in why}
    return [
        f"{len(often)} tensors were rounded {name}, {why[name]}: up to {max(one.misrounded for one in often):.1%} of "
        f"their elements are not the nearest value (e.g. {often[0].tensor})"
        for name, often in found.items()
        if often
    ]


class _Verification:
    """One run over the tensors of an output."""

    def __init__(self, opened: Opened, intended: Intended, sample: float, progress: Progress) -> None:
        self.reader = Reader()
        self.findings: list[Finding] = []
        self.results: list[TensorResult] = []
        self.equal = 0
        self._opened = opened
        self._intended = intended
        self._progress = progress
        self._checker = Checker(reader=self.reader, sample=sample, others=self._others)

    def tensors(self) -> None:
        """Find every tensor that should be there, compare it, and name what is left over."""
        found = self._places()
        for name, recipe in self._intended.recipes.items():
            place = found.get(name)
            if place is None:
                self._missing(name)
            else:
                self._one(recipe, self._opened.tensors[place])
        self._left_over({place: name for name, place in found.items()})

    def _places(self) -> dict[str, str]:
        """Return by the name of each recipe that of its tensor; tools differ in prefixes."""
        there = self._opened.tensors
        found = {name: name for name in self._intended.recipes if name in there}
        names, taken = Names(there, self._opened.config), set(found)
        for name in self._intended.recipes:
            other = names.find(name) if name not in found else None
            if other is not None and other not in taken:
                found[name] = other
                taken.add(other)
        return found

    def _one(self, recipe: Recipe, stored: Source) -> None:
        problem = self._misfit(recipe, stored)
        if problem:
            self.findings.append(problem)
        if recipe.shape == stored.shape and (problem is None or problem.check == "dtype"):
            self._compare(recipe, stored)
        self._progress(stored.stored_bytes)

    def _compare(self, recipe: Recipe, stored: Source) -> None:
        try:
            result, findings = self._checker.check(recipe, stored)
        except (CheckpointError, NumericsError) as error:
            self.findings.append(_finding("value", recipe.name, f"cannot be read: {error}"))
            return
        self.findings += findings
        if result is None:
            self.equal += not findings
        else:
            self.results.append(result)

    def _misfit(self, recipe: Recipe, stored: Source) -> Finding | None:
        if recipe.shape != stored.shape:
            return _finding("shape", recipe.name, f"is {stored.shape}, expected {recipe.shape}")
        plain = isinstance(stored, StoredTensor)
        if plain and stored.dtype not in (recipe.dtype, *self._also(recipe)):
            return _finding("dtype", recipe.name, f"is {stored.dtype}, expected {recipe.dtype}")
        return None

    def _also(self, recipe: Recipe) -> list[str]:
        """Other tools write all weights in one dtype, also those that the base keeps in another."""
        return [self._opened.main_dtype] if is_plain_float(recipe.dtype) else []

    def _missing(self, name: str) -> None:
        there, config = self._opened.tensors, self._opened.config
        ties = [tie for tie in known_ties([*there, name], config) if tie.target == name and tie.source in there]
        if ties and any(tie.target == name for tie in self._intended.twins):
            return  # stored once where the base has it twice
        if _BUFFER.search(name):
            return
        why = (
            f": the adapter acts on one side of the tie with {ties[0].source} only, so both are stored" if ties else ""
        )
        self.findings.append(_finding("missing", name, f"is not in the output{why}"))

    def _left_over(self, taken: dict[str, str]) -> None:
        """Tensors that nobody asked for: a tied one must equal its source, others should not be there."""
        there = self._opened.tensors
        configs = (self._opened.config, self._intended.config)
        ties = {tie.target: tie.source for config in configs for tie in known_ties(there, config)}
        for name, stored in there.items():
            if name in taken or _BUFFER.search(name) or self._is_of_runtime(name):
                continue
            source = self._intended.recipes.get(taken.get(ties.get(name, ""), ""))
            if source is None:
                self.findings.append(_finding("extra", name, "is not a tensor of base + adapter"))
            else:
                self._tied(name, stored, source)

    def _is_of_runtime(self, name: str) -> bool:
        return name in self._intended.base.aside

    def _tied(self, name: str, stored: Source, source: Recipe) -> None:
        result, findings = self._checker.check(source, stored)
        self.results += [result] if result is not None and not findings else []
        if findings:
            message = (
                f"is stored beside {source.name}, to which it is tied, with other values: stale ({findings[0].message})"
            )
            self.findings.append(_finding("tied", name, message))

    def _others(self, recipe: Recipe) -> list[Candidate]:
        """Tensors of the same shape, which may have changed places with this one."""
        same = [
            other
            for other in self._intended.recipes.values()
            if other.shape == recipe.shape and other.name != recipe.name
        ]
        return [Candidate(recipe=other) for other in same[:_MOST_CANDIDATES]]


def _finding(check: str, where: str, message: str) -> Finding:
    return Finding(check=check, where=where, message=message)
