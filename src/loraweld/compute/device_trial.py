"""What a plan needs of a device, tried before a byte is written: not every device of torch has every operation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from loraweld.checkpoint.reader import Reader
from loraweld.compute.codecs.encoder import open_encoder
from loraweld.errors import RequestError
from loraweld.planning.device_work import is_decomposed_on_device, is_encoded_on_device
from loraweld.planning.merge_plan import Recipe


def try_device(device: torch.device, recipes: Iterable[Recipe], reader: Reader) -> None:
    """Encode a few rows into each encoding that is made on `device`, and decompose a small matrix if any is.

    Raises:
        RequestError: the device cannot do one of them.
    """
    tried: set[object] = set()
    for recipe in recipes:
        kind = recipe.encoding, recipe.searches, recipe.dtype
        if is_encoded_on_device(recipe) and kind not in tried:
            tried.add(kind)
            with _named(device, f"encode {recipe.name!r}"):
                _encode_some(recipe, reader, device)
        if is_decomposed_on_device(recipe) and "decomposition" not in tried:
            tried.add("decomposition")
            with _named(device, f"decompose {recipe.name!r}"):
                torch.linalg.svd(torch.eye(2, device=device))
                torch.linalg.qr(torch.eye(2, device=device))


def _encode_some(recipe: Recipe, reader: Reader, device: torch.device) -> None:
    assert recipe.encoding is not None
    rows, cols = min(recipe.rows, recipe.encoding.unit_rows(recipe.shape)), recipe.source.cols
    values_nC = torch.linspace(-1, 1, rows * cols).view(rows, cols)
    encoder = open_encoder(recipe, reader, device)
    if encoder.observes:
        encoder.observe(0, values_nC)
    encoder.encode(0, values_nC)
    encoder.decoded()
    encoder.parts()


@contextmanager
def _named(device: torch.device, what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise RequestError(
            f"device {device} cannot {what}: torch {torch.__version__} says: {error}. Leave the device out for the CPU"
        ) from error
