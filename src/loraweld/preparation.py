"""A request → its plan and what it was made of, for every way of running it."""

from __future__ import annotations

from loraweld.errors import RequestError
from loraweld.export.pipeline import plan_export
from loraweld.planning.build import build_plan
from loraweld.planning.collector import collector_paused
from loraweld.planning.facts import Facts, gather_facts
from loraweld.planning.lora_output import plan_lora
from loraweld.planning.merge_plan import MergePlan
from loraweld.request import MergeRequest


def plan_request(request: MergeRequest, facts: Facts | None = None) -> tuple[MergePlan, Facts | None]:
    """Open the inputs, if `facts` are not what is in them, and plan; an adapter written alone has no facts of a base.

    Raises:
        LoraweldError: the merge would be refused.
    """
    try:
        if request.save_method == "lora":
            return plan_lora(request), None
        if request.save_method == "gguf":
            return plan_export(request, facts)
        with collector_paused():
            facts = facts or gather_facts(request)
            return build_plan(request, facts), facts
    except OSError as error:  # a name too long, a folder that may not be read
        raise RequestError(f"{str(error.filename)[:200]}: {error.strerror}") from None
