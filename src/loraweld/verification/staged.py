"""The check of an output before it is published: `loraweld merge --verify`."""

from __future__ import annotations

import time
from pathlib import Path

from loraweld.errors import VerificationError
from loraweld.planning.facts import Facts
from loraweld.request import MergeRequest
from loraweld.verification.intended import planned
from loraweld.verification.opened import open_output
from loraweld.verification.verify import verify_opened

_SHOWN = 10


def check_staged(folder: Path, request: MergeRequest, facts: Facts, *, dtype: str) -> None:
    """Compare the model in `folder` with what `request` asked for; `dtype` is the code of its main weights.

    Raises:
        VerificationError: it does not hold; lists the findings.
    """
    started = time.monotonic()
    intended = planned(request, facts, dtype=dtype)
    report = verify_opened(open_output(folder), intended, sample=1.0, progress=None, started=started)
    if not report.holds:
        shown = [f"  {finding}" for finding in report.findings[:_SHOWN]]
        raise VerificationError(
            f"the merged model is not base + adapter and was not published, {len(report.findings)} findings:\n"
            + "\n".join(shown)
            + "\nIs the disk or the memory at fault? Merge again; if it stays, this is a bug of loraweld"
        )
