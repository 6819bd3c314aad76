"""One adapter against the base: which stored tensor each of its tensors acts on, and how.

Every adapter tensor ends in exactly one claim, or in the list of problems that refuses the merge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraweld.adapter.edits import AddVector, Dora, Edit, LowRank, ReplaceRows
from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import is_plain_float
from loraweld.errors import AdapterError, MatchError
from loraweld.naming.names import Names
from loraweld.naming.roles import has_row_per_token, is_task_head
from loraweld.naming.tied import Tie
from loraweld.planning.lowrank import embedding_edits, linear_edits

_PART_SETS = {
    "linear": {"lora_A", "lora_B", "lora_bias", "magnitude"},
    "embedding": {"embedding_A", "embedding_B", "magnitude"},
    "tokens": {"token_rows"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`adapter` changes tensor `name`: `edits` in order, or `replacement` of the whole tensor.

    `owner` is the adapter's folder (two may have one name), `keys` its tensors that are consumed. `is_new`: the
    base does not store `name`. `is_copy`: the replacement is PEFT's copy of the layer it wrapped, which further
    edits then act on.
    """

    adapter: str
    owner: Path
    module: str
    name: str
    keys: tuple[str, ...]
    is_new: bool
    is_copy: bool = False
    replacement: StoredTensor | None = None
    edits: tuple[Edit, ...] = ()

    @property
    def what(self) -> str:
        """A few words for the report: the method with its rank and scaling."""
        if self.replacement is not None:
            return "new tensor" if self.is_new else "replaced"
        return ", ".join(_words(edit) for edit in self.edits)


def _words(edit: Edit) -> str:
    match edit:
        case LowRank():
            return f"lora r={edit.rank} s={edit.scaling:g}"
        case Dora():
            return f"dora r={edit.rank} s={edit.delta.scaling:g}"
        case ReplaceRows():
            return f"{len(edit.indices)} token rows"
        case _:
            return edit.kind


class ClaimFinder:
    """Finds the claims of one adapter on `base`; `problems` collects what fits nothing."""

    def __init__(self, base: Base, adapter: Adapter, ties: Sequence[Tie]) -> None:
        self.claims: list[Claim] = []
        self.problems: list[str] = []
        self._base = base
        self._adapter = adapter
        self._names = Names(base.tensors, base.config)
        self._ties = {tie.target: tie for tie in ties}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def find(self) -> None:
        """Fill `claims` and `problems`; whole tensors first, since edits must fit what they replace."""
        for parameter, tensor in self._adapter.parameters.items():
            self._collect(parameter, partial(self._whole, parameter, tensor))
        for module, parts in self._adapter.modules.items():
            self._collect(module, partial(self._parts, module, parts))
        if not self.problems:
            claimed = Counter(key for claim in self.claims for key in claim.keys)
            assert claimed == Counter(self._adapter.keys), "an adapter tensor was left over or used twice"

    def _collect(self, what: str, step: Callable[[], list[Claim]]) -> None:
        try:
            self.claims += step()
        except (MatchError, AdapterError) as error:
            self.problems.append(f"{self._adapter.label}: {what}: {error}")

    def _whole(self, parameter: str, tensor: StoredTensor) -> list[Claim]:
        name, is_new = self._locate(parameter)
        if not is_plain_float(tensor.dtype):
            raise AdapterError(f"is stored as {tensor.dtype}, expected a float")
        shape = self._shape(name) if not is_new or name in self._ties else tensor.shape
        may_resize = has_row_per_token(name) or is_task_head(name)
        if tensor.shape != shape and not (may_resize and tensor.shape[1:] == shape[1:]):
            raise MatchError(f"is {tensor.shape}, but {name!r} of the base is {shape}")
        self._shapes[name] = tensor.shape
        module = parameter.rpartition(".")[0]
        is_copy = ".base_layer." in tensor.name
        return [self._claim(module, name, (tensor,), replacement=tensor, is_copy=is_copy)]

    def _parts(self, module: str, parts: Mapping[str, StoredTensor]) -> list[Claim]:
        kinds = [kind for kind, words in _PART_SETS.items() if words & set(parts) - {"magnitude"}]
        if len(kinds) != 1 or not set(parts) <= _PART_SETS[kinds[0]]:
            raise AdapterError(f"has the parts {', '.join(sorted(parts))}, which do not belong together")
        name, is_new = self._locate(f"{module}.weight")
        if is_new and name not in self._ties:
            raise MatchError("the base has no such layer")
        for part, tensor in parts.items():
            if not is_plain_float(tensor.dtype):
                raise AdapterError(f"{part} is stored as {tensor.dtype}, expected a float")
        edits = self._edits(kinds[0], module, parts, self._shape(name))
        weight_parts = tuple(tensor for part, tensor in parts.items() if part != "lora_bias")
        claims = [self._claim(module, name, weight_parts, edits=tuple(edits))]
        if "lora_bias" in parts:
            claims.append(self._bias(module, parts["lora_bias"], edits))
        return claims

    def _edits(self, kind: str, module: str, parts: Mapping[str, StoredTensor], target: tuple[int, ...]) -> list[Edit]:
        config = self._adapter.config
        if kind == "linear":
            return linear_edits(config, module, parts, target, self._base.model_type)
        if kind == "embedding":
            return embedding_edits(config, module, parts, target)
        rows = parts["token_rows"]
        indices = _token_indices(config.token_indices, module)
        if rows.shape != (len(indices), target[1]) or max(indices, default=0) >= target[0]:
            raise MatchError(f"{rows.shape} rows for the tokens {indices} do not fit {target}")
        return [ReplaceRows(rows=rows, indices=indices)]

    def _bias(self, module: str, values: StoredTensor, edits: Sequence[Edit]) -> Claim:
        name, is_new = self._locate(f"{module}.bias", must_exist=False)
        if is_new:
            raise MatchError(
                "was trained with lora_bias, but the base layer has no bias to add it to; the architecture "
                "would need one. Train without lora_bias, or start from a base with biases"
            )
        if values.shape != self._shape(name):
            raise MatchError(f"lora_B.bias is {values.shape}, {name!r} of the base is {self._shape(name)}")
        scaling = next(edit.scaling for edit in edits if isinstance(edit, LowRank))
        return self._claim(module, name, (values,), edits=(AddVector(values=values, scaling=scaling),))

    def _claim(
        self,
        module: str,
        name: str,
        tensors: tuple[StoredTensor, ...],
        *,
        replacement: StoredTensor | None = None,
        is_copy: bool = False,
        edits: tuple[Edit, ...] = (),
    ) -> Claim:
        return Claim(
            adapter=self._adapter.label,
            owner=self._adapter.folder,
            module=module,
            name=name,
            keys=tuple(tensor.name for tensor in tensors),
            is_new=name not in self._base.tensors,
            is_copy=is_copy,
            replacement=replacement,
            edits=edits,
        )

    def _locate(self, parameter: str, *, must_exist: bool = True) -> tuple[str, bool]:
        """Return (tensor name, whether it is new); a tied parameter or a saved head may be new."""
        name = self._names.find(parameter)
        if name is not None:
            stored = self._base.tensors[name]
            if not is_plain_float(stored.dtype):
                raise MatchError(f"{name!r} is stored as {stored.dtype}, which is not a weight that can be merged into")
            return name, False
        if parameter in self._ties or not must_exist or self._is_new_head(parameter):
            return parameter, True
        raise MatchError(f"the base has no tensor for it (looked for {parameter!r})")

    def _is_new_head(self, parameter: str) -> bool:
        """A layer that was trained from nothing: named in modules_to_save, unknown to every name of the base.

        PEFT saves each module whose path ends with a name, mid-word too: "classifier" saves "pre_classifier".
        """
        for saved in self._adapter.config.modules_to_save:
            before, found, _ = parameter.partition(f"{saved}.")
            if found and not self._names.knows(before.rpartition(".")[2] + saved):
                return True
        return False

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name` as this adapter's edits meet it."""
        if name in self._shapes:
            return self._shapes[name]
        source = self._ties[name].source if name in self._ties else name
        return self._shapes.get(source, self._base.tensors[source].shape)


def _token_indices(by_module: Mapping[str, tuple[int, ...]], module: str) -> tuple[int, ...]:
    for name, indices in by_module.items():
        if not name or module == name or module.endswith(f".{name}"):
            return indices
    raise AdapterError("has trained token rows, but trainable_token_indices does not name it")
