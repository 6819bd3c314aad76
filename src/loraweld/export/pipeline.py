"""`--save-method gguf`: a merge whose model is converted before the output appears."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loraweld.export.gguf import make_files, publish_files
from loraweld.export.tools import check_tools
from loraweld.planning.build import build_plan
from loraweld.planning.facts import Facts, gather_facts
from loraweld.planning.gguf_output import plan_gguf
from loraweld.planning.merge_plan import MERGED_FOLDER, RECORD_NAME, MergePlan, OutputFile
from loraweld.request import MergeRequest
from loraweld.sinks import system
from loraweld.sinks.folder import Complete

_WORK = ".converting"


def plan_export(request: MergeRequest, facts: Facts | None = None) -> tuple[MergePlan, Facts]:
    """Check the tools, open the inputs, if they are not open yet, and plan.

    Raises:
        LoraweldError: a tool is missing, or the merge would be refused.
    """
    check_tools(request.gguf_types)
    facts = facts or gather_facts(request)
    merge = build_plan(replace(request, save_method="merged_16bit"), facts)
    return plan_gguf(merge, request), facts


def completion(made: MergePlan, say: Callable[[str], None]) -> Complete | None:
    """Return what turns a staged output that holds the merged model into the one of the plan, None if it is that.

    It may be repeated: a run that was killed in its midst leaves nothing that the next one would take for finished.
    """
    export = made.export
    if export is None:
        return None

    def complete(output: Path) -> None:
        model, work = output / MERGED_FOLDER, output / _WORK
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        say(f"converting to {', '.join(export.types)}")
        files = make_files(model, work, name=export.name, types=export.types, dtype=made.dtype, about=made.output)
        publish_files(files, output)
        system.copy_file(model / RECORD_NAME, output / RECORD_NAME)
        shutil.rmtree(work)
        if not export.keeps_merged:
            shutil.rmtree(model)

    return complete


def beside_export(plan: MergePlan, complete: Complete, name: str, text: str) -> tuple[MergePlan, Complete]:
    """Return a plan that ends in files of another program, and its end, with one more file beside them."""
    assert plan.export is not None
    file = OutputFile(name=name, num_bytes=len(text.encode()))

    def complete_with_file(output: Path) -> None:
        complete(output)
        with (output / name).open("wb") as target:
            target.write(text.encode())
            target.flush()
            os.fsync(target.fileno())

    return replace(plan, export=replace(plan.export, files=(*plan.export.files, file))), complete_with_file
