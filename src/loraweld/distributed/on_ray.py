"""The parts of a batch as tasks of a Ray cluster. The driver plans, waits and publishes; it holds no weights.

A task whose worker is lost is started again elsewhere, by Ray, and continues from what the part has noted.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from loraweld.distributed.batch import Batch
from loraweld.distributed.plan_file import document_text, open_batch
from loraweld.errors import LoraweldError, OutputError, RequestError
from loraweld.execute.parts import Part
from loraweld.planning.merge_plan import MergePlan

PART_BYTES = 2 << 30
# What Ray's worker takes besides the merge, with room; measured with Ray 2.60.
WORKER_BYTES = 120 << 20
_LOOK_SECONDS = 2.0
# Of a worker, which makes one part after the other: else each part's threads take an arena of their own, and what they
# leave there stays. In a running process `keep_freed_memory` comes too late. Source: mallopt(3) of glibc.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
_RETRIES = 5
_ANSWER_SECONDS = 10.0
_END_SECONDS = 60.0


def run_on_ray(batch: Batch, document: Mapping[str, Any], *, address: str | None) -> None:
    """Make all parts on the cluster at `address`; None takes that of RAY_ADDRESS, or one on this machine for the time.

    Raises:
        LoraweldError: a part was refused, or could not be made; no task runs any more, what is finished stays noted.
        RequestError: Ray is not installed, or cannot be reached.
    """
    with _cluster(address) as ray:
        made = batch.delivery.made
        task = ray.remote(_make_part).options(
            num_cpus=-(-made.workers // 2),  # two of four threads compute, the others wait for disk or network
            memory=declared_memory(made),
            max_retries=_RETRIES,
            runtime_env={"env_vars": _ENVIRONMENT},
            name="loraweld",
        )
        count = max(1, min(len(batch.work), math.ceil(made.merged_bytes / PART_BYTES) + _slots(ray, made.workers)))
        text = document_text(document)
        parts = [Part(count=count, number=number) for number in range(1, count + 1)]
        waiting = {task.remote(text, part.count, part.number): part for part in parts}
        try:
            _await(ray, waiting, batch)
        finally:
            _cancel(ray, [*waiting])


def _await(ray: Any, waiting: dict[Any, Part], batch: Batch) -> None:
    """Take tasks out of `waiting` as they end, until there is none, or one has failed."""
    shown = _Shown(batch)
    while waiting:
        ready, _ = ray.wait([*waiting], timeout=_LOOK_SECONDS)
        for reference in ready:
            _check(ray, reference, waiting.pop(reference), batch)
        shown.update()


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """End tasks, and return when they have ended: what they were making may be removed then."""
    for task in tasks:
        ray.cancel(task, force=True)
    if tasks:
        ray.wait(tasks, num_returns=len(tasks), timeout=_END_SECONDS)


def declared_memory(made: MergePlan) -> int:
    """Return the bytes that a task asks of the cluster."""
    return made.peak_memory_bytes + WORKER_BYTES


def _make_part(text: str, count: int, number: int) -> tuple[bool, str] | None:
    """The task: make a part; return whether it can be continued and what a user can fix, None if all is well."""
    try:
        _batch(text).run(Part(count=count, number=number))
    except LoraweldError as error:
        return isinstance(error, OutputError), str(error)
    return None


@lru_cache(maxsize=1)
def _batch(text: str) -> Batch:
    """Plan once in a worker process, however many parts it makes."""
    from loraweld.sinks.system import keep_freed_memory

    keep_freed_memory()
    return open_batch(json.loads(text))


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected; the connection ends with the block if it was not there before."""
    try:
        import ray
    except ImportError:
        raise RequestError("--executor ray needs Ray: pip install 'loraweld[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    try:
        _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (OSError, ValueError) as error:
        raise RequestError(f"the Ray cluster {address or ''} cannot be reached: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


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
    """Raises:
    OutputError: what is finished can be continued.
    LoraweldError: it would fail again.
    """
    try:
        problem = ray.get(reference)
    except ray.exceptions.RayError as error:
        problem = True, f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"
    if problem is None:
        return
    continues, said = problem
    if continues:
        raise OutputError(f"part {part} failed: {said}", path=batch.delivery.made.output)
    raise LoraweldError(f"part {part}: {said}")


class _Shown:
    """Tells the bytes that the parts have noted since the last look."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._bytes = {item.key: item.end - item.start for stretch in batch.work for item in stretch}

    def update(self) -> None:
        """Look once."""
        done = {key for record in self._batch.place.records().values() for key in record.done}
        self._batch.delivery.progress(sum(self._bytes.pop(key, 0) for key in done))
