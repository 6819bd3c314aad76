"""A local folder as the output: staged in a hidden sibling, journalled, published by one rename.

    parent/.NAME.loraweld/lock       held while a merge runs
    parent/.NAME.loraweld/journal    what is finished and durable (see `journal`)
    parent/.NAME.loraweld/cloned     which files share their unchanged blocks with the base's
    parent/.NAME.loraweld/model/     the output while it grows
    parent/NAME                      appears, complete, by renaming model/

A reader of parent/NAME sees a complete model or what was there before. Where other files are made of the merged model,
that one grows in a folder inside model/, and they are made before the rename.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraweld.checkpoint.mounted import mounted
from loraweld.errors import OutputError
from loraweld.sinks import system
from loraweld.sinks.journal import Journal, Noted, PartJournal, is_head, read_journal

_CLONED_NAME = "cloned"
TAKEN = "exists and is not empty; give --overwrite to replace it, or choose another output"


Complete = Callable[[Path], None]


class FolderSink:
    """Create files, write at offsets, finish files, publish. Used inside `open_folder_sink`.

    `complete` makes of the staged output, which holds a merged model in `model_folder`, what is to be published.
    `files_at_once`: how many files may be unfinished at a time, None for any number.
    """

    files_at_once: int | None = None

    def __init__(
        self,
        target: Path,
        staging: Path,
        journal: Journal | PartJournal,
        *,
        overwrite: bool,
        model_folder: str = "",
        complete: Complete | None = None,
    ) -> None:
        self.journal = journal
        self._target = target.absolute()
        self._staging = staging
        self._overwrite = overwrite
        self._output = staging / "model"
        self._model = self._output / model_folder
        self._complete = complete
        self._descriptors: dict[str, int] = {}

    def has(self, key: str) -> bool:
        """Return whether the file of a journalled item (name:start:end) still reaches to the item's end."""
        name, _, end = key.rsplit(":", 2)
        path = self._model / name
        return path.is_file() and path.stat().st_size >= int(end)

    def create(self, name: str, size: int, *, aligned: bool) -> None:
        """Open output file `name` with `size` bytes reserved; what an earlier run wrote stays.

        Raises:
            OSError: among others ENOSPC.
        """
        path = self._model / name
        self._descriptors[name] = system.open_for_writing(path, size, direct=aligned)

    def write_at(self, name: str, offset: int, buffer: memoryview, count: int) -> None:
        """Write the first `count` bytes of an aligned buffer; at a block-aligned offset if the file is `aligned`."""
        system.write_at(self._descriptors[name], buffer, offset, count)

    def least_bytes(self, size: int) -> int:
        """Any number of bytes can be written."""
        return 0

    def end_stretch(self, name: str) -> None:
        """What was written is where it belongs."""

    def copies(self, source: Path) -> bool:
        """Whether a whole file is best copied as one: not if it comes from the network, in pieces."""
        return mounted(source) is None

    def starts_from(self, name: str, source: Path) -> bool:
        """Make `name` a clone that shares its blocks with `source`, where the file system can; a resume knows of it."""
        path, memory = self._model / name, self._staging / _CLONED_NAME
        known = memory.read_text().splitlines() if memory.is_file() else []
        if path.exists() or mounted(source) is not None:
            return name in known
        path.parent.mkdir(parents=True, exist_ok=True)
        if not system.clone_file(source, path):
            return False
        memory.write_text("\n".join([*known, name]))
        return True

    def copy(self, name: str, source: Path) -> None:
        """Make `name` a durable copy of `source`."""
        path = self._model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        system.copy_file(source, path)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file durably."""
        path = self._model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def make_durable(self, names: Iterable[str]) -> None:
        """Return when all writes to these files, and their names, would survive a power loss."""
        for name in names:
            system.make_durable(self._descriptors[name])
        system.sync_folder(self._model)

    def finish(self, name: str, size: int) -> None:
        """Close `name` at its final size, durably."""
        descriptor = self._descriptors.pop(name)
        try:
            system.finish(descriptor, size)
        finally:
            os.close(descriptor)

    def publish(self) -> None:
        """Make the complete output appear under its name; replaces an old one in one step, if that is allowed.

        Raises:
            OutputError: something has appeared in the output place; the finished model stays staged.
        """
        self.complete()
        for folder in [self._output, *(path for path in self._output.rglob("*") if path.is_dir())]:
            system.sync_folder(folder)
        if self._target.exists() and any(self._target.iterdir()):
            if not self._overwrite:
                raise OutputError(TAKEN, path=self._target)
            self._replace_old()
        else:
            self._output.replace(self._target)
        system.sync_folder(self._target.absolute().parent)
        self.clean_up()

    def complete(self) -> None:
        """Make what is to be published besides the merged model, or in its place."""
        if self._complete is not None:
            self._complete(self._output)

    def clean_up(self) -> None:
        """Remove the staging folder: after publishing, or when there is nothing to continue."""
        remove_staging(self._staging)

    def close(self) -> None:
        """Close what is still open; what was journalled stays for the next run."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self.journal.close()

    def _replace_old(self) -> None:
        if system.exchange(self._output, self._target):
            return
        old = self._staging / "old"
        self._target.replace(old)
        self._output.replace(self._target)


def staging_folder(target: Path) -> Path:
    """Return the hidden sibling in which the output of `target` grows."""
    target = target.absolute()
    return target.parent / f".{target.name}.loraweld"


@contextmanager
def open_folder_sink(
    target: Path,
    *,
    identity: Callable[[], str],
    resume: bool,
    overwrite: bool,
    model_folder: str = "",
    complete: Complete | None = None,
    kind: Callable[..., FolderSink] = FolderSink,
    elsewhere: Path | None = None,
) -> Iterator[FolderSink]:
    """Lock the output place and yield its sink; `identity`, asked when it is needed, says whose the staged files are.

    `elsewhere`: the memory of files that have left the staging folder, of the same merge or of none.

    Raises:
        OutputError: another merge into the same place is running, or the place cannot be written.
    """
    staging = staging_folder(target)
    with locked_place(target, staging):
        restore_interrupted_replace(target, staging)
        output, path = staging / "model", staging / "journal"
        journal = Journal.resume(path, identity, output) if resume else None
        if journal is None:
            path.unlink(missing_ok=True)  # first: without a journal nothing in the folder counts
            for memory in (elsewhere, staging / _CLONED_NAME):
                if memory is not None:
                    memory.unlink(missing_ok=True)
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            journal = Journal.begin(path, identity, output)
        sink = kind(target, staging, journal, overwrite=overwrite, model_folder=model_folder, complete=complete)
        try:
            (output / model_folder).mkdir(exist_ok=True)
            journal.done = {key: values for key, values in journal.done.items() if sink.has(key)}
            yield sink
        finally:
            sink.close()


def finish_published(target: Path, *, identity: Callable[[], str]) -> Noted | None:
    """Return the items of this very merge if it was published by a run that was killed before it could clean up.

    Raises:
        OutputError: another merge into the same place is running.
    """
    staging = staging_folder(target)
    _sweep(staging)
    if not staging.exists():
        return None
    with locked_place(target, staging):
        head, done, _ = read_journal(staging / "journal")
        if not (target.is_dir() and is_head(head, identity, target)):
            return None
        remove_staging(staging)
        return done


def discard_staging(target: Path) -> None:
    """Remove what is staged for an output that turned out to be complete."""
    staging = staging_folder(target)
    if staging.exists():
        with locked_place(target, staging):
            remove_staging(staging)


@contextmanager
def locked_place(target: Path, staging: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an output place; a `shared` one keeps out all but the other parts of the same merge.

    Raises:
        OutputError: somebody else has it.
    """
    with system.file_lock(staging / "lock", shared=shared) as locked:
        if not locked:
            raise OutputError(
                "another merge into this place is running; wait for it or choose another output", path=target
            )
        yield


def remove_staging(staging: Path) -> None:
    """Remove a staging folder in one step for others to see: by name first, then its contents."""
    aside = staging.with_name(f"{staging.name}.removed-{os.getpid()}")
    staging.replace(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(staging: Path) -> None:
    """Finish the removals that a kill has interrupted."""
    for left in staging.parent.glob(f"{glob.escape(staging.name)}.removed-*"):
        shutil.rmtree(left, ignore_errors=True)


def restore_interrupted_replace(target: Path, staging: Path) -> None:
    """A kill between the two renames of a replacement without exchange: the old model goes back first."""
    old = staging / "old"
    if old.exists() and not target.exists():
        old.replace(target)
