"""One weight put into an encoding: decode → edit in float32 → encode, tile by tile, as a stream of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.encoder import open_encoder
from loraweld.compute.editor import EditSession, Findings, Scratch, TensorEditor
from loraweld.compute.fidelity import Fidelity
from loraweld.planning.merge_plan import Recipe

_SESSION_ELEMENTS = 1 << 24


class WeightEncoding:
    """Makes the stored form of one recipe, within one thread; `fidelity` says how good it is, if it was edited.

    The rows are edited and checked on the CPU, and encoded on `device`.
    """

    def __init__(
        self, recipe: Recipe, reader: Reader, findings: Findings, scratch: Scratch, device: torch.device
    ) -> None:
        assert recipe.encoding is not None
        unit_rows = recipe.encoding.unit_rows(recipe.shape)
        self.fidelity = Fidelity()
        self._recipe = recipe
        self._scratch = scratch
        self._encoder = open_encoder(recipe, reader, device)
        self._editor = TensorEditor(recipe, reader, findings, device=device, unit_rows=unit_rows)

    def stream(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of codes and scales in the order of the recipe's parts.

        Raises:
            NumericsError: a value does not exist in the weight's dtype; names the tensor.
            CheckpointError: the source cannot be read.
        """
        if self._encoder.observes:
            for session, top, bottom in self._tiles():
                self._encoder.observe(top, session.edited(top, bottom).values_nC)
        for session, top, bottom in self._tiles():
            codes = self._encode(session, top, bottom)
            if self._streams:
                yield _bytes(codes)
        made = self._encoder.parts()
        for part in self._recipe.parts[1 if self._streams else 0 :]:
            yield _bytes(made[part.role])

    @property
    def _streams(self) -> bool:
        return self._recipe.encoding is not None and self._recipe.encoding.streams

    def _tiles(self) -> Iterator[tuple[EditSession, int, int]]:
        """Tiles in order, a session for a few of them: it holds what its rows need of the adapter."""
        grid, rows = self._editor.grid, self._recipe.rows
        step = max(1, _SESSION_ELEMENTS // (grid.height * grid.num_cols)) * grid.height
        for start in range(0, rows, step):
            session = self._editor.session(start, min(rows, start + step), self._scratch)
            for top, bottom in session.tiles:
                if top >= start:
                    yield session, top, bottom

    def _encode(self, session: EditSession, top: int, bottom: int) -> torch.Tensor:
        tile = session.edited(top, bottom)
        session.check(tile, top, bottom)
        codes = self._encoder.encode(top, tile.values_nC)
        if self._recipe.edits:
            stored_nC = self._encoder.decoded()
            session.note(stored_nC, tile.base_nC, tile.error)
            self.fidelity.add(stored_nC.float(), tile.values_nC, tile.base_nC.float())
        return codes


def _bytes(values: torch.Tensor) -> npt.NDArray[np.uint8]:
    made: npt.NDArray[np.uint8] = values.contiguous().view(-1).view(torch.uint8).numpy()
    return made
