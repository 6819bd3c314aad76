"""plan.json: a merge's options, and what the plan came to when it was saved, for processes that make its parts.

Every process plans anew, from headers alone, and refuses to go on if its plan is not the one that was saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from loraweld._version import __version__
from loraweld.checkpoint.jsonfile import dump_json, read_json_object
from loraweld.checkpoint.url import shown
from loraweld.combine.methods import Combination
from loraweld.delivery import Progress
from loraweld.distributed.batch import Batch, Place, place_of
from loraweld.errors import OutputError, RequestError
from loraweld.preparation import plan_request
from loraweld.request import MergeRequest

# What belongs to a process, not to the merge. A token is a secret: it comes from the environment.
_NOT_SAVED = ("token", "hub", "executor", "ray_address")


def everywhere(request: MergeRequest) -> MergeRequest:
    """Return the request as every process understands it, whatever its working directory."""
    return replace(
        request,
        adapters=tuple(map(_absolute, request.adapters)),
        base=request.base and _absolute(request.base),
        output=request.output.absolute(),
        tokenizer=request.tokenizer and _absolute(request.tokenizer),
    )


def plan_document(batch: Batch) -> dict[str, Any]:
    """Return what a process needs to make a part of `batch`, a request for `everywhere`, as plain JSON values.

    Raises:
        RequestError: a URL holds a password, which would be in it.
    """
    request = batch.delivery.request
    for url in filter(None, (request.store, request.base, request.tokenizer, *request.adapters)):
        if shown(url) != url:
            raise RequestError(f"{shown(url)}: a plan does not keep the password of a URL; give it in the environment")
    values = {key.name: getattr(request, key.name) for key in fields(request) if key.name not in _NOT_SAVED}
    return {
        "loraweld_version": __version__,
        "identity": batch.identity,
        "request": {
            **values,
            "combination": asdict(request.combination),
            "output": str(request.output),
        },
        "plan": batch.delivery.made.to_json(),
    }


def save_document(document: Mapping[str, Any], path: Path) -> None:
    """Write plan.json, as a whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(dump_json(document), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise OutputError(f"the plan cannot be saved: {error.strerror}", path=path) from None


def load_document(path: Path) -> Mapping[str, Any]:
    """Read plan.json.

    Raises:
        RequestError: it is not one.
    """
    if not path.is_file():
        raise RequestError(f"plan {path} is not a file; make it with loraweld plan … --save {path.name}")
    found = read_json_object(path)
    wanted = {"identity": str, "request": dict, "plan": dict}
    for name, kind in wanted.items():
        if not isinstance(found.get(name), kind):
            raise RequestError(f"{path}: has no {name!r}, expected a plan that loraweld plan --save has written")
    return found


def open_batch(document: Mapping[str, Any], *, progress: Progress = lambda count: None) -> Batch:
    """Plan again, and return the batch if it is the one that was saved.

    Raises:
        RequestError: the saved options are damaged, or of another version.
        OutputError: another plan comes out now: an input has changed.
    """
    version = document.get("loraweld_version")
    if version != __version__:
        raise RequestError(f"the plan was saved by loraweld {version}, this is {__version__}; save the plan again")
    request = _request(document["request"])
    made, facts = plan_request(request)
    batch = Batch.of(request, made, facts, progress=progress)
    if batch.identity != document["identity"]:
        raise OutputError(
            "the plan was saved for other inputs than are there now: base or adapter have changed, or are other files "
            "here. Every part must see the same; save the plan again",
            path=made.output,
        )
    return batch


def saved_place(document: Mapping[str, Any]) -> tuple[Place, str]:
    """Return the place of a saved plan and its name, whether or not its inputs are still there."""
    request = _request(document["request"])
    return place_of(request, document["identity"]), request.store or str(request.output)


def document_text(document: Mapping[str, Any]) -> str:
    """Return a document as one line, to be sent to another process."""
    return json.dumps(document)


def _request(values: Mapping[str, Any]) -> MergeRequest:
    """Return the request that was saved.

    Raises:
        RequestError: its options are damaged, or of another version.
    """
    lists = {key: tuple(one) for key, one in values.items() if isinstance(one, list)}
    try:
        combination: dict[str, Any] = {**values["combination"], "weights": tuple(values["combination"]["weights"])}
        return MergeRequest(
            **{**values, **lists, "combination": Combination(**combination), "output": Path(values["output"])}
        )
    except (TypeError, KeyError) as error:
        raise RequestError(f"the saved plan has options that this version does not know: {error}") from None


def _absolute(name: str) -> str:
    """A folder by its absolute path; a URL or a Hub id stays as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name
