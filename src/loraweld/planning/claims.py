"""One adapter against the base: which stored tensor each of its tensors acts on, and how.

Every adapter tensor ends in exactly one claim, or in the list of problems that refuses the merge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loraweld.adapter.edits import (
    AddVector,
    Dora,
    Edit,
    Hadamard,
    Layer,
    LowRank,
    OnRows,
    ReplaceRows,
    SingularValues,
    Weighted,
)
from loraweld.adapter.files import Adapter
from loraweld.checkpoint.base import Base
from loraweld.checkpoint.stored import StoredTensor
from loraweld.dtypes import is_plain_float
from loraweld.errors import AdapterError, MatchError
from loraweld.naming.conversions import Split
from loraweld.naming.experts import ExpertNames
from loraweld.naming.names import Names
from loraweld.naming.roles import has_row_per_token, is_task_head
from loraweld.naming.tied import Tie
from loraweld.planning.experts import ExpertPair, expert_edits, one_expert_edit, version_of, wrapped_parameter
from loraweld.planning.lowrank import embedding_edits, linear_edits
from loraweld.planning.targets import is_target
from loraweld.planning.tuned_layers import Tuned, layer_edits, make_layer

_WRAPPER = ".base_layer"
_ADDS_TWICE = (0, 21, 2)
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
    edits then act on. `aside`: why the claim, which fits, changes nothing.
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
    aside: str = ""

    @property
    def what(self) -> str:
        """A few words for the report: the method with its rank and scaling."""
        if self.aside:
            return self.aside
        if self.replacement is not None:
            return "new tensor" if self.is_new else "replaced"
        return ", ".join(dict.fromkeys(_words(edit) for edit in self.edits))


def _words(edit: Edit) -> str:
    match edit:
        case LowRank():
            return f"lora r={edit.rank} s={edit.scaling:g}"
        case Dora():
            return f"dora r={edit.rank} s={edit.delta.scaling:g}"
        case SingularValues() | Hadamard():
            return f"{edit.kind} r={edit.rank}"
        case ReplaceRows():
            return f"{len(edit.indices)} token rows"
        case OnRows():
            return _words(edit.edit)
        case Weighted():
            return f"{', '.join(map(_words, edit.edits))} × {edit.weight:g}"
        case _:
            return edit.kind


def _on_part(edit: Edit, split: Split, height: int) -> OnRows:
    return OnRows(edit=edit, start=split.part * height, stop=(split.part + 1) * height)


class ClaimFinder:
    """Finds the claims of one adapter on `base`; `problems` collects what fits nothing."""

    def __init__(
        self, base: Base, names: Names, adapter: Adapter, ties: Sequence[Tie], *, expert_layout: str = "auto"
    ) -> None:
        self.claims: list[Claim] = []
        self.problems: list[str] = []
        self._base = base
        self._adapter = adapter
        self._label = adapter.label
        self._names = names
        self._experts = ExpertNames(base.tensors, names)
        self._expert_layout = expert_layout
        self._ties = {tie.target: tie for tie in ties}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def find(self) -> None:
        """Fill `claims` and `problems`; whole tensors first, since edits must fit what they replace."""
        for parameter, tensor in self._adapter.parameters.items():
            self._collect(parameter, partial(self._whole, parameter, tensor))
        if self._adapter.config.peft_type == "LORA" and not self._adapter.config.uses_peft_layer:
            for module, parts in self._adapter.modules.items():
                self._collect(module, partial(self._parts, module, parts))
        else:
            self._find_tuned()
        if not self.problems:
            claimed = Counter(key for claim in self.claims for key in claim.keys)
            assert claimed == Counter(self._adapter.keys), "an adapter tensor was left over or used twice"

    def _collect(self, what: str, step: Callable[[], list[Claim]]) -> None:
        try:
            self.claims += step()
        except (MatchError, AdapterError) as error:
            self.problems.append(f"{self._label}: {what}: {error}")

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
            names = ", ".join(sorted(tensor.name for tensor in parts.values()))
            raise AdapterError(f"has the parts {', '.join(sorted(parts))}, which do not belong together: {names}")
        if set(parts) == {"lora_A", "lora_B"}:
            claims = self._of_experts(module, parts["lora_A"], parts["lora_B"]) or self._of_attention(module, parts)
            if claims:
                return claims
        if kinds[0] == "linear" and self._names.find(f"{module}.weight") is None:
            split = self._names.find_part(f"{module}.weight")
            if split is not None:
                return self._of_split(module, parts, split)
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

    def _of_experts(self, module: str, a: StoredTensor, b: StoredTensor) -> list[Claim]:
        """The claims of a pair on experts: on one tensor for all of them, or on those of each."""
        config, tensors = self._adapter.config, self._base.tensors
        if self._names.find(f"{module}.weight") is not None:
            return []
        wrapped = wrapped_parameter(config, module, self._experts)
        if wrapped is not None:
            parameter, pieces = wrapped
            pair = ExpertPair(
                parameter=parameter,
                a=a,
                b=b,
                config=config,
                model_type=self._base.model_type,
                layout=self._expert_layout,
            )
            found = expert_edits(pair, pieces, tensors)
        else:
            one = self._experts.one_expert(module)
            if one is None:
                return []
            found = [(one.name, one_expert_edit(config, module, a, b, one, tensors[one.name]))]
        return self._spread(module, (a, b), found)

    def _of_split(self, module: str, parts: Mapping[str, StoredTensor], split: Split) -> list[Claim]:
        """The claims of a layer that is some rows of a stored tensor, as one projection of three."""
        rows, *cols = self._shape(split.stored)
        height = rows // split.parts
        edits = self._edits("linear", module, parts, (height, *cols))
        weight = tuple(tensor for part, tensor in parts.items() if part != "lora_bias")
        claims = self._spread(module, weight, [(split.stored, _on_part(edit, split, height)) for edit in edits])
        if "lora_bias" in parts:
            bias = self._names.find_part(f"{module}.bias")
            if bias is None:
                raise MatchError("was trained with lora_bias, but the base layer has no bias to add it to")
            scaling = next(edit.scaling for edit in edits if isinstance(edit, LowRank))
            edit = _on_part(AddVector(values=parts["lora_bias"], scaling=scaling), bias, height)
            claims += self._spread(module, (parts["lora_bias"],), [(bias.stored, edit)])
        return claims

    def _of_attention(self, module: str, parts: Mapping[str, StoredTensor]) -> list[Claim]:
        """nn.MultiheadAttention: one tensor for queries, keys and values, and the output that PEFT adds twice.

        Source: PEFT 0.21.2, lora/layer.py, `MultiheadAttention.merge`; its forward pass does so too.
        """
        inside = self._names.find(f"{module}.in_proj_weight")
        outside = module.replace(f"{_WRAPPER}.out_proj", ".out_proj") if module.endswith(f"{_WRAPPER}.out_proj") else ""
        name = inside or (self._names.find(f"{outside}.weight") if outside else None)
        if name is None:
            return []
        edits = linear_edits(self._adapter.config, module, parts, self._shape(name), self._base.model_type)
        version = version_of(self._adapter.config.peft_version)
        if outside and version is not None and version > _ADDS_TWICE:
            raise AdapterError(
                f"is the output of an nn.MultiheadAttention, to which PEFT up to 0.21.2 adds its delta twice; whether "
                f"{self._adapter.config.peft_version} still does is not known here. Update loraweld"
            )
        if outside:
            edits = [replace(edit, scaling=2 * edit.scaling) if isinstance(edit, LowRank) else edit for edit in edits]
        return self._spread(module, tuple(parts.values()), [(name, edit) for edit in edits])

    def _spread(self, module: str, tensors: tuple[StoredTensor, ...], found: Sequence[tuple[str, Edit]]) -> list[Claim]:
        """Claims of one pair on several tensors: its keys are consumed once, by the first."""
        by_name: dict[str, list[Edit]] = {}
        for name, edit in found:
            by_name.setdefault(name, []).append(edit)
        used = [tensors, *[()] * (len(by_name) - 1)]
        return [
            self._claim(module, name, keys, edits=tuple(edits))
            for (name, edits), keys in zip(by_name.items(), used, strict=True)
        ]

    def _find_tuned(self) -> None:
        """Claims of a tuner other than plain LoRA; what all its layers share is consumed by the first of them."""
        modules = dict(self._adapter.modules) or self._targets()
        tokens = {module: parts for module, parts in modules.items() if "token_rows" in parts}
        for module, parts in tokens.items():
            self._collect(module, partial(self._parts, module, parts))
        tuned: list[Tuned] = []
        for module, parts in modules.items():
            if module not in tokens:
                self._collect(module, partial(self._tuned, module, parts, tuned))
        shared = tuple(self._adapter.shared.values())
        layers = tuple(one.layer for one in tuned)
        for one in tuned:
            self._collect(one.layer.module, partial(self._tuned_claims, one, layers, shared))
            shared = ()
        if shared:
            self.problems.append(f"{self._label}: {', '.join(t.name for t in shared)}: no layer uses it")

    def _targets(self) -> dict[str, dict[str, StoredTensor]]:
        """The layers of an adapter whose file has nothing of them, as Uni-LoRA's: those that the config names."""
        modules = [name.removesuffix(".weight") for name, t in self._base.tensors.items() if len(t.shape) > 1]
        return {module: {} for module in modules if is_target(module, self._adapter.config)}

    def _tuned(self, module: str, parts: Mapping[str, StoredTensor], found: list[Tuned]) -> list[Claim]:
        name, is_new = self._locate(f"{module}.weight")
        if is_new and name not in self._ties:
            raise MatchError("the base has no such layer")
        bias, lacks_bias = self._locate(f"{module}.bias", must_exist=False)
        layer = make_layer(self._adapter.config, module, name, self._shape(name), not lacks_bias, self._base.model_type)
        weight = self._base.tensors[self._ties[name].source if name in self._ties else name]
        stored_bias = None if lacks_bias else self._base.tensors.get(bias)
        found.append(Tuned(layer=layer, parts=parts, weight=weight, bias=stored_bias))
        return []

    def _tuned_claims(self, tuned: Tuned, layers: tuple[Layer, ...], shared: tuple[StoredTensor, ...]) -> list[Claim]:
        module = tuned.layer.module
        edits = layer_edits(self._adapter, tuned, layers, self._base.config)
        keys = (*tuned.parts.values(), *shared)
        claims = []
        for parameter, edit in edits.items():
            name, _ = self._locate(f"{module}.{parameter}")
            claims.append(self._claim(module, name, keys, edits=(edit,)))
            keys = ()
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
            adapter=self._label,
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
