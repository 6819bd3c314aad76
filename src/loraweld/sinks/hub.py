"""A repository of the Hub as the output: a file is sent as soon as it is complete, then it is gone from the disk.

    parent/.NAME.loraweld/lock, journal, model/    as of a folder; model/ holds the files that are not sent yet
    parent/.NAME.loraweld/sent                     what the Hub has already

The commit that names all of them is the last step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loraweld.hub.upload import Pushed, Upload
from loraweld.sinks.folder import FolderSink, staging_folder
from loraweld.sinks.journal import Journal

_SENT_NAME = "sent"


def sent_memory(target: Path) -> Path:
    """Where a push that is staged for `target` remembers what the Hub has."""
    return staging_folder(target) / _SENT_NAME


class HubSink(FolderSink):
    """Has the verbs of a folder sink. At most two files are on the disk: one grows while one is sent."""

    files_at_once = 2

    def __init__(
        self,
        target: Path,
        staging: Path,
        journal: Journal,
        *,
        upload: Upload,
        overwrite: bool = False,
        model_folder: str = "",
        complete: None = None,
    ) -> None:
        super().__init__(target, staging, journal, overwrite=overwrite)
        self._upload = upload
        self.pushed: Pushed | None = None

    def has(self, key: str) -> bool:
        """What was sent is finished."""
        return key.rsplit(":", 2)[0] in self._upload.sent or super().has(key)

    def create(self, name: str, size: int, *, aligned: bool) -> None:
        """Open a file that the Hub does not have yet."""
        if name not in self._upload.sent:
            super().create(name, size, aligned=aligned)

    def copies(self, source: Path) -> bool:
        """Whether a file is taken as it is: by the Hub from the base's repository, or from this machine."""
        return super().copies(source) or self._upload.can_copy(source.name, None)

    def starts_from(self, name: str, source: Path) -> bool:
        """Files that are here for a while only are written anew."""
        return False

    def copy(self, name: str, source: Path) -> None:
        """Let the Hub copy the file, else send it; what is small stays for the commit."""
        local = source if super().copies(source) else None
        if name in self._upload.sent or self._upload.copy(name, source.name, local):
            return
        if not self._upload.send(name, source):
            super().copy(name, source)

    def make_durable(self, names: Iterable[str]) -> None:
        """Of the files that are still here."""
        super().make_durable(name for name in names if name in self._descriptors)

    def finish(self, name: str, size: int) -> None:
        """Close a file at its final size and send it."""
        if name not in self._upload.sent:
            super().finish(name, size)
            self._send(name)

    def publish(self) -> None:
        """Commit what was sent and what is still here.

        Raises:
            OutputError: the Hub refuses; what was sent is remembered for the next run.
        """
        self.pushed = self._upload.commit(self._output, replaces_weights=True)
        self.clean_up()

    def _send(self, name: str) -> None:
        if self._upload.send(name, self._model / name):
            (self._model / name).unlink()
