"""What a program has told torch holds again afterwards, and changes nothing meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from loraweld.torch_settings import plain_arithmetic
from scenes import Scene


@pytest.fixture(params=["medium", "high", "highest"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """A program's choice for products of float32 numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_products_are_of_float32_meanwhile(precision: str) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), plain_arithmetic():
        assert torch.get_num_threads() == 1
        assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision


def test_who_ends_first_changes_nothing_for_the_other(precision: str) -> None:
    """Two merges of one process, in threads of its own, end as they like."""
    threads = torch.get_num_threads()
    first, second = ExitStack(), ExitStack()
    first.enter_context(plain_arithmetic())
    second.enter_context(plain_arithmetic())
    first.close()
    assert torch.get_num_threads() == 1
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    second.close()
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == precision


def test_a_torch_with_one_setting_is_told_so_too(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.9 there were none for each backend."""
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None)
    with plain_arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision


def test_a_merge_is_the_same_whatever_a_program_that_trains_has_chosen(scene: Scene, precision: str) -> None:
    seen = []
    scene.merge(progress=lambda count: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
    scene.check_finished()
    assert "ieee" in seen
    assert torch.get_float32_matmul_precision() == precision
