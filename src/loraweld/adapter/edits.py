"""What an adapter does to one stored tensor, as plain values: no arithmetic here, see `compute/`.

Shape letters: O = output features, I = input features, R = rank, T = token rows, N = rows, C = columns of the
matrix view of the stored tensor (first size × product of the others).

The edits of a tensor are applied in order, each to the result of the one before it, as the forward pass of
PEFT chains several adapters; norms and decompositions are always those of the unedited tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from loraweld.adapter.tuners import TUNERS
from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Every `step`-th column of a factor from `start` on, before `stop`."""

    start: int
    stop: int
    step: int = 1

    def count(self, num_cols: int) -> int:
        """Return how many columns of a factor with `num_cols` these are."""
        return len(range(self.start, min(self.stop, num_cols), self.step))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """W += scaling · B·A, or its transpose for tensors stored as (in, out).

    a: (R, I), or (R, I, *kernel); b: (O, R), or (O, R, 1, …). Embeddings and transformers' Conv1D are
    stored transposed. Of factors that many experts share, `a_columns` and `b_columns` are those that act here.
    Source: LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732.
    """

    kind: ClassVar[str] = "lora"
    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool
    a_columns: Columns | None = None
    b_columns: Columns | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of the stored tensor that the delta was made for."""
        if not self.transposed:
            return self.b.shape[0]
        return self.a.cols if self.a_columns is None else self.a_columns.count(self.a.cols)

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora:
    """W ← m / ‖W₀ + Δ‖ · (W + Δ), the norm over the inputs of each output feature, m of O elements.

    Where the tensor is stored transposed the norm runs down its columns. Source: DoRA, arXiv:2402.09353,
    equation 5; for several adapters the norm is that of the unedited W₀ (PEFT 0.21.2, lora/variants.py).
    """

    kind: ClassVar[str] = "dora"
    delta: LowRank
    magnitude: StoredTensor

    @property
    def rank(self) -> int:
        return self.delta.rank

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (*self.delta.refs, self.magnitude)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """W ← W − scaling · B₀·A₀, rounded to the dtype of W: the base that PiSSA and OLoRA trained against.

    B₀ and A₀ are derived from W again: the leading `rank` singular triplets, or columns of its QR
    decomposition. Source: PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; PEFT 0.21.2, lora/layer.py.
    """

    kind: ClassVar[str] = "residual"
    method: str  # "pissa" or "olora"
    rank: int
    scaling: float
    transposed: bool

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AddVector:
    """b += scaling · values, both of O elements (`lora_bias`)."""

    kind: ClassVar[str] = "lora_bias"
    values: StoredTensor
    scaling: float

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceRows:
    """Rows `indices` take the values of `rows`, (T, C): trained token embeddings."""

    kind: ClassVar[str] = "token_rows"
    rows: StoredTensor
    indices: tuple[int, ...]

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (self.rows,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowRows:
    """The tensor grows to `num_rows` rows, new ones the mean of the stored ones: a vocabulary grown, not trained.

    transformers initialises such rows with the mean plus noise of variance 1e-9 times the covariance
    (`resize_token_embeddings(mean_resizing=True)`, 5.23); the mean alone is the reproducible part of it.
    """

    kind: ClassVar[str] = "grow"
    num_rows: int

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRows:
    """`edit` acts on rows [start, stop) of the stored tensor, as if they were a tensor of their own.

    So are experts that lie in one tensor, and projections that are stored as one.
    """

    kind: ClassVar[str] = "rows"
    edit: Edit
    start: int
    stop: int

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return self.edit.refs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceAll:
    """The tensor takes the values of another one of its shape: what is inside `Weighted` for a trained tensor."""

    kind: ClassVar[str] = "replaced"
    values: StoredTensor

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """W ← W + weight · (W′ − W), where W′ is what `edits`, one after the other, make of W.

    Between 0 and 1 it lies on the line from W without to W with the edits, below 0 on the other side of W.
    """

    kind: ClassVar[str] = "weighted"
    edits: tuple[Edit, ...]
    weight: float

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return tuple(ref for edit in self.edits for ref in edit.refs)

    @property
    def replaces(self) -> bool:
        """True if W′ is a trained tensor as a whole."""
        return any(isinstance(edit, ReplaceAll) for edit in self.edits)


@dataclass(frozen=True, slots=True, kw_only=True)
class SingularValues:
    """W += scaling · B·diag(e)·A, or its transpose; e of R elements, A and B (R, C) and (N, R) of the matrix view.

    Source: AdaLoRA, arXiv:2303.10512, equation 3; PEFT 0.21.2, adalora/layer.py (scaling is alpha / (init_r + 1e-5)
    whatever ranks were pruned).
    """

    kind: ClassVar[str] = "adalora"
    delta: LowRank
    values: StoredTensor

    @property
    def rank(self) -> int:
        return self.delta.rank

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (*self.delta.refs, self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """W += scaling · (left₁·right₁) ∘ (left₂·right₂), each left (N, R) and right (R, C).

    Source: FedPara, arXiv:2108.06098, proposition 1; PEFT 0.21.2, loha/layer.py.
    """

    kind: ClassVar[str] = "loha"
    pairs: tuple[tuple[StoredTensor, StoredTensor], tuple[StoredTensor, StoredTensor]]
    scaling: float

    @property
    def rank(self) -> int:
        return self.pairs[0][1].shape[0]

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for pair in self.pairs for tensor in pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker:
    """W += scaling · F₁ ⊗ F₂; each factor a matrix (N₁, C₁) and (N₂, C₂), or a product of two matrices.

    Source: KronA, arXiv:2212.10650, section 4; LyCORIS, arXiv:2309.14859; PEFT 0.21.2, lokr/layer.py.
    """

    kind: ClassVar[str] = "lokr"
    first: tuple[StoredTensor, ...]
    second: tuple[StoredTensor, ...]
    scaling: float

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (*self.first, *self.second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """W ← W times one factor for each row, or (`by_column`) for each column or C / len(factors) columns in turn.

    Source: (IA)³, arXiv:2205.05638, section 3.3; PEFT 0.21.2, ia3/layer.py.
    """

    kind: ClassVar[str] = "ia3"
    factors: StoredTensor
    by_column: bool

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return (self.factors,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer as PEFT sees it: its path, its class ("linear", "conv1d", "embedding" or "conv"), its weight's shape."""

    module: str
    kind: str
    shape: tuple[int, ...]
    has_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLayer:
    """`parameter` ← what PEFT's own layer merges it to: tuners whose formula is not written out here.

    `config` is the text of adapter_config.json. `own` are the module's tensors and `shared` those of all modules, each
    with its name behind the module's path or behind `base_model.`. `others` are all layers of the adapter, this one
    among them, where it depends on them; `model_config` is the base's config.json where it depends on their order.
    `weight` is the layer's weight where `parameter` is the bias, `bias` its bias where that is the weight.
    """

    tuner: str
    config: str
    layer: Layer
    parameter: str
    own: tuple[tuple[str, StoredTensor], ...]
    shared: tuple[tuple[str, StoredTensor], ...]
    others: tuple[Layer, ...] = ()
    model_config: str = ""
    weight: Source | None = None
    bias: Source | None = None

    @property
    def kind(self) -> str:
        return f"{self.tuner.lower()}, by PEFT"

    @property
    def needs_base(self) -> bool:
        """Whether what it changes hangs on the values that the parameter has; variants of LoRA may."""
        return self.tuner == "LORA" or TUNERS[self.tuner].needs_base

    @property
    def refs(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for _, tensor in (*self.own, *self.shared))


Edit = (
    LowRank
    | Dora
    | Residual
    | AddVector
    | ReplaceRows
    | GrowRows
    | SingularValues
    | Hadamard
    | Kronecker
    | Scale
    | PeftLayer
    | ReplaceAll
    | Weighted
    | OnRows
)


def weighed(edits: Sequence[Edit], weight: float) -> tuple[Edit, ...]:
    """Return edits that change a tensor by `weight` times what `edits`, as a whole, change it by.

    A plain addition has the weight in its scaling; any other edit is wrapped.
    """
    if weight == 1 or not edits:
        return tuple(edits)
    scaled = [edit for edit in (_scaled(edit, weight) for edit in edits) if edit is not None]
    return tuple(scaled) if len(scaled) == len(edits) else (Weighted(edits=tuple(edits), weight=weight),)


def _scaled(edit: Edit, weight: float) -> Edit | None:
    """Return a plain addition with the weight in its scaling, None if the edit is none."""
    match edit:
        case LowRank() | AddVector():
            return replace(edit, scaling=weight * edit.scaling)
        case OnRows():
            inner = _scaled(edit.edit, weight)
            return None if inner is None else replace(edit, edit=inner)
        case _:
            return None


def unwrapped(edits: Iterable[Edit]) -> Iterator[Edit]:
    """Yield the edits themselves, whatever their weights."""
    for edit in edits:
        if isinstance(edit, Weighted):
            yield from unwrapped(edit.edits)
        else:
            yield edit
