"""Numbers → the stored form of a weight: the one door to writing an encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loraweld.checkpoint.encodings.bnb4 import Bnb4
from loraweld.checkpoint.encodings.grouped import Awq, Gptq, Packed
from loraweld.checkpoint.encodings.microscaled import MxFp4, NvFp4
from loraweld.checkpoint.encodings.scaled import Scaled
from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.bnb4_encode import Bnb4Encoder
from loraweld.compute.codecs.grouped_encode import AwqEncoder, GptqEncoder, PackedEncoder
from loraweld.compute.codecs.microscaled_encode import MxFp4Encoder, NvFp4Encoder
from loraweld.compute.codecs.scaled_encode import ScaledEncoder
from loraweld.compute.device import HOST
from loraweld.planning.device_work import is_encoded_on_device
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


class DeviceEncoder:
    """An encoder whose work lies on another device: takes rows that are on the CPU, and gives back what is on it."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self.observes = encoder.observes
        self._encoder = encoder
        self._device = device

    def observe(self, top: int, values_nC: torch.Tensor) -> None:
        self._encoder.observe(top, values_nC.to(self._device))

    def encode(self, top: int, values_nC: torch.Tensor) -> torch.Tensor:
        return self._encoder.encode(top, values_nC.to(self._device)).cpu()

    def decoded(self) -> torch.Tensor:
        return self._encoder.decoded().cpu()

    def parts(self) -> Mapping[str, torch.Tensor]:
        return {role: part.cpu() for role, part in self._encoder.parts().items()}


def open_encoder(recipe: Recipe, reader: Reader, device: torch.device = HOST) -> Encoder:
    """Return the encoder of a recipe, which works on `device` if its kind of encoding does.

    Where the source is in that very encoding its scales are kept, unless a value outgrows them: what the adapter does
    not change then stays as it is.
    """
    if device == HOST or not is_encoded_on_device(recipe):
        return _encoder(recipe, reader, HOST)
    return DeviceEncoder(_encoder(recipe, reader, device), device)


def _encoder(recipe: Recipe, reader: Reader, device: torch.device) -> Encoder:
    encoding, form = recipe.encoding, recipe.form
    keeps = form is not None and form == recipe.source
    match encoding:
        case Bnb4():
            options = {"searches": recipe.searches, "decodes": bool(recipe.edits)}
            return Bnb4Encoder(encoding, recipe.shape, recipe.dtype, device=device, **options)
        case Scaled():
            return ScaledEncoder(encoding, recipe.shape, recipe.dtype, form, reader, keeps=keeps, device=device)
    assert form is not None, f"{encoding} is only kept, never chosen"
    match encoding:
        case Packed():
            return PackedEncoder(form, encoding, reader, keeps=keeps)
        case Gptq():
            return GptqEncoder(form, encoding, reader, keeps=keeps)
        case Awq():
            return AwqEncoder(form, encoding, reader, keeps=keeps)
        case NvFp4():
            return NvFp4Encoder(form, encoding, reader, keeps=keeps)
        case MxFp4():
            return MxFp4Encoder(form, reader, keeps=keeps)
        case _:
            raise AssertionError(f"no encoder for {encoding}")
