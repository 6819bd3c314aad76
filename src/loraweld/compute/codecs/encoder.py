"""Numbers → the stored form of a weight: the one door to writing an encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.encoded import EncodedTensor
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.bnb4_encode import Bnb4Encoder
from loraweld.compute.codecs.scaled_encode import ScaledEncoder
from loraweld.planning.merge_plan import Recipe


class Encoder(Protocol):
    """Encodes one weight, its rows in order, in tiles of whole units (`Encoding.unit_rows`)."""

    @property
    def observes(self) -> bool:
        """Whether it must have seen all rows before the first is encoded."""

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        """See the float32 rows from `top` on."""

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        """Return the codes of the float32 rows from `top` on; an encoding that does not stream holds them instead."""

    def decoded(self) -> torch.Tensor:
        """Return what the rows encoded last will decode to, in the weight's dtype, (n, C)."""

    def parts(self) -> Mapping[str, torch.Tensor]:
        """Return all other parts by role, once all rows are encoded; with the codes if they do not stream."""


def open_encoder(recipe: Recipe, reader: Reader) -> Encoder:
    """Return the encoder of a recipe.

    Where the source is in that very encoding its scales are kept, unless a value outgrows them: what the adapter does
    not change then stays as it is.
    """
    source, encoding = recipe.source, recipe.encoding
    grid = source if isinstance(source, EncodedTensor) and source.encoding == encoding else None
    match encoding:
        case Bnb4():
            return Bnb4Encoder(encoding, recipe.shape, recipe.dtype, searches=recipe.searches)
        case Scaled():
            return ScaledEncoder(encoding, recipe.shape, recipe.dtype, grid, reader)
        case _:
            raise AssertionError(f"no encoder for {encoding}")
