"""What an output should be: the plan of the merge it claims to be, in plain weights, whatever it is stored as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraweld.checkpoint.base import CONFIG_NAME, Base
from loraweld.checkpoint.url import is_url
from loraweld.dtypes import NAME_BY_FLOAT_CODE
from loraweld.errors import RequestError
from loraweld.naming.tied import Tie
from loraweld.planning.build import build_plan
from loraweld.planning.facts import Facts, gather_facts
from loraweld.planning.merge_plan import RECORD_NAME, MergePlan, Recipe
from loraweld.record import file_sha256
from loraweld.request import NEAREST, MergeRequest, PathLike, make_request
from loraweld.verification.findings import Finding
from loraweld.verification.opened import Opened

# What of a recorded combination goes back into a request as it is.
_OPTIONS = ("weights", "density", "seed", "svd_rank", "majority_sign_method")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intended:
    """Recipes by the names of the base; `facts` keep what they read from."""

    request: MergeRequest
    facts: Facts
    recipes: Mapping[str, Recipe]
    config: Mapping[str, Any]

    @property
    def base(self) -> Base:
        return self.facts.base

    @property
    def twins(self) -> tuple[Tie, ...]:
        return self.facts.twins


def intend(
    opened: Opened,
    *,
    base: PathLike | None,
    adapters: Sequence[PathLike],
    options: Mapping[str, Any],
) -> tuple[Intended, list[Finding]]:
    """Plan the merge that `opened` should be, and say where the inputs are not those of its record.

    Raises:
        LoraweldError: no adapter was given, or base and adapters cannot be merged at all.
    """
    record = opened.record
    if not adapters:
        named = ", ".join(str(one.get("name")) for one in record.get("adapters") or ())
        raise RequestError(
            f"which adapter {opened.folder} was merged with must be given with --adapter"
            f"{f'; its record names {named}' if named else ''}"
        )
    request = make_request(
        list(adapters),
        output=opened.folder,
        base=base if base is not None else _recorded_base(record),
        dtype=_dtype(opened, record),
        **{**_combination(record), **_rounding(record, options), **options},
    )
    request = replace(request, reads_only=True)  # axolotl, for one, puts the model into the adapter's folder
    facts = gather_facts(request)
    return planned(request, facts), _unlike_record(facts, record)


def planned(request: MergeRequest, facts: Facts, *, dtype: str | None = None) -> Intended:
    """Return what a request should come to, in plain weights; `dtype` is a code, None that of the request."""
    name = request.dtype if dtype is None else NAME_BY_FLOAT_CODE[dtype]
    plain = replace(request, save_method="merged_16bit", dtype=name, hub=None, keeps_output=True)
    plan = build_plan(plain, facts)
    return Intended(
        request=request,
        facts=facts,
        recipes={recipe.name: recipe for recipe in plan.recipes},
        config=_config(plan, facts.base),
    )


def _config(plan: MergePlan, base: Base) -> Mapping[str, Any]:
    for file in plan.small:
        if file.name == CONFIG_NAME and file.text is not None:
            return dict(json.loads(file.text))
    return base.config


def _recorded_base(record: Mapping[str, Any]) -> str | None:
    """A base of the Hub; of a local one the record has the last part of its path only, and a URL is not followed."""
    base = record.get("base") or {}
    name = str(base.get("name"))
    return name if base.get("commit") and not is_url(name) else None


def _dtype(opened: Opened, record: Mapping[str, Any]) -> str:
    return NAME_BY_FLOAT_CODE.get(str(record.get("dtype") or opened.main_dtype), "auto")


def _combination(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("combination") or {}
    options = {name: found[name] for name in _OPTIONS if name in found}
    return options | ({"combine": found["method"]} if found.get("method") else {})


def _rounding(record: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded rounding, unless another is asked for."""
    found = record.get("rounding")
    if not isinstance(found, Mapping) or "rounding" in options:
        return {}
    return {"rounding": found.get("method", NEAREST), "seed": found.get("seed")}


def _unlike_record(facts: Facts, record: Mapping[str, Any]) -> list[Finding]:
    """Inputs other than those that the record names."""
    findings = []
    said = [str(one.get("sha256")) for one in record.get("adapters") or ()]
    given = [file_sha256(adapter.weights) for adapter in facts.given]
    for adapter, digest in zip(facts.given, given, strict=True):
        if said and digest not in said:
            message = (
                f"sha256 {digest[:12]}…, the record names {', '.join(one[:12] + '…' for one in said)}: another adapter"
            )
            findings.append(Finding(check="record", where=adapter.label, message=message))
    if len(said) > len(given):
        message = f"names {len(said)} adapters, {len(given)} were given; give each with --adapter"
        findings.append(Finding(check="record", where=RECORD_NAME, message=message))
    headers = (record.get("base") or {}).get("headers_sha256") or {}
    found = {file.path.name: hashlib.sha256(file.description).hexdigest() for file in facts.base.files}
    if headers and headers != found:
        message = "its files are not those of the record: another base, or another revision of it"
        findings.append(Finding(check="record", where=facts.base.label, message=message))
    return findings
