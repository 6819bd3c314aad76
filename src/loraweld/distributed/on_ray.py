"""The parts of a batch as tasks of a Ray cluster. The driver plans, waits and publishes; it holds no weights.

A task whose worker is lost is started again elsewhere, by Ray, and continues from what the part has noted.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from loraweld.distributed.batch import Batch
from loraweld.distributed.plan_file import document_text, open_batch
from loraweld.errors import LoraweldError, OutputError, RequestError
from loraweld.execute.parts import Part
from loraweld.planning.merge_plan import MergePlan
from loraweld.sinks.store import THREAD_BYTES

PART_BYTES = 2 << 30
# What Ray's worker, and the client of an object store, take besides the merge; measured with Ray 2.60, s3fs 2026.9.
WORKER_BYTES = 280 << 20
_LOOK_SECONDS = 2.0
_RETRIES = 5
_ANSWER_SECONDS = 10.0


def run_on_ray(batch: Batch, document: Mapping[str, Any], *, address: str | None) -> None:
    """Make all parts on the cluster at `address`; None starts one on this machine, or takes that of RAY_ADDRESS.

    Raises:
        OutputError: a part could not be made; what is finished stays noted.
        RequestError: Ray is not installed, or cannot be reached.
    """
    ray = _ray(address)
    made = batch.delivery.made
    task = ray.remote(_make_part).options(
        num_cpus=-(-made.workers // 2),  # two of four threads compute, the others wait for disk or network
        memory=declared_memory(made),
        max_retries=_RETRIES,
        name="loraweld",
    )
    count = max(1, min(len(batch.work), math.ceil(made.merged_bytes / PART_BYTES) + _slots(ray, made.workers)))
    text = document_text(document)
    parts = [Part(count=count, number=number) for number in range(1, count + 1)]
    waiting = {task.remote(text, part.count, part.number): part for part in parts}
    shown = _Shown(batch)
    while waiting:
        ready, _ = ray.wait([*waiting], timeout=_LOOK_SECONDS)
        for reference in ready:
            _check(ray, reference, waiting.pop(reference), batch)
        shown.update()


def declared_memory(made: MergePlan) -> int:
    """Return the bytes that a task asks of the cluster."""
    of_store = made.workers * THREAD_BYTES if made.store else 0
    return made.peak_memory_bytes + WORKER_BYTES + of_store


def _make_part(text: str, count: int, number: int) -> str | None:
    """The task: make a part; return what a user can fix, None if all is well."""
    try:
        _batch(text).run(Part(count=count, number=number))
    except LoraweldError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _batch(text: str) -> Batch:
    """Plan once in a worker process, however many parts it makes."""
    from loraweld.sinks.system import keep_freed_memory

    keep_freed_memory()
    return open_batch(json.loads(text))


def _ray(address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise RequestError("--executor ray needs Ray: pip install 'loraweld[ray]'") from None
    if not ray.is_initialized():
        try:
            _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except (OSError, ValueError) as error:
            raise RequestError(f"the Ray cluster {address or ''} cannot be reached: {error}") from None
    return ray


def _check_answers(address: str) -> None:
    """Raises:
    OSError: nobody listens at HOST:PORT. Ray itself would try for many minutes.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()


def _slots(ray: Any, workers: int) -> int:
    """How many tasks the cluster runs at a time."""
    return max(1, int(ray.cluster_resources().get("CPU", os.cpu_count() or 1)) // -(-workers // 2))


def _check(ray: Any, reference: Any, part: Part, batch: Batch) -> None:
    try:
        problem = ray.get(reference)
    except ray.exceptions.RayError as error:
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
    if problem is not None:
        raise OutputError(f"part {part} failed: {problem}", path=batch.delivery.made.output)


class _Shown:
    """Tells the bytes that the parts have noted since the last look."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._bytes = {item.key: item.end - item.start for stretch in batch.work for item in stretch}

    def update(self) -> None:
        """Look once."""
        done = {key for record in self._batch.place.records().values() for key in record.done}
        self._batch.delivery.progress(sum(self._bytes.pop(key, 0) for key in done))
