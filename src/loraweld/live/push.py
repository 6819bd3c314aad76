"""A model in memory → a repository of the Hub, in one commit; what can be refused is refused before the merge."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweld.hub.repository import look_at_repository
from loraweld.hub.target import HubTarget
from loraweld.live.machine import workspace
from loraweld.live.parameters import SaveOptions
from loraweld.live.save import Push, save_model

_log = logging.getLogger("loraweld")


def push_model(model: Any, options: SaveOptions, target: HubTarget, *, keep_folder: bool = False) -> None:
    """Send the model file by file and commit it; the repository is as it was if anything fails.

    With `keep_folder` it is made in a folder named like the repository, which stays.

    Raises:
        RequestError: the token cannot write, or the repository has the other visibility.
        OutputError: the Hub refuses or cannot be reached.
        LoraweldError: the model cannot be saved.
    """
    target = replace(target, tags=options.tags, datasets=options.datasets)
    repository = look_at_repository(target)
    options = replace(options, token=repository.token)
    push = Push(repository=repository, keeps_output=keep_folder)
    if keep_folder:
        pushed = save_model(model, options, Path(target.name), push=push)
    else:
        with workspace(options.temporary_location) as work:
            pushed = save_model(model, options, work / "push" / target.name, push=push)
    if target.create_pr and pushed is not None:
        _log.warning("pull request: %s", pushed.url)
