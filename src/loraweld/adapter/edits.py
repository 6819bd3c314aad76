"""What an adapter does to one stored tensor, as plain values: no arithmetic here, see `compute/`.

Shape letters: O = output features, I = input features, R = rank, T = token rows, N = rows, C = columns of the
matrix view of the stored tensor (first size × product of the others).

The edits of a tensor are applied in order, each to the result of the one before it, as the forward pass of
PEFT chains several adapters; norms and decompositions are always those of the unedited tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraweld.checkpoint.encodings.encoded import Source
from loraweld.checkpoint.stored import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """W += scaling · B·A, or its transpose for tensors stored as (in, out).

    a: (R, I), or (R, I, *kernel); b: (O, R), or (O, R, 1, …). Embeddings and transformers' Conv1D are
    stored transposed. Source: LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732.
    """

    kind: ClassVar[str] = "lora"
    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of the stored tensor that the delta was made for."""
        return self.a.cols if self.transposed else self.b.shape[0]

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
    `weight` is the layer's weight where `parameter` is the bias.
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

    @property
    def kind(self) -> str:
        return f"{self.tuner.lower()}, by PEFT"

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
)
