"""A quantised base that is damaged, contradicts its config or is of an unknown kind is refused, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import strategies
from encoded_bases import (
    LAYER,
    WEIGHT,
    codes,
    config_of,
    decoded,
    nf4,
    of_layer,
    opened,
    pack_awq,
    pack_rows,
    scales,
)
from loraweld.errors import CheckpointError

Tensors, Config = dict[str, Tensor], dict[str, Any]
ROWS, COLS, GROUP = 16, 64, 32
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def fp8_codes(rows: int = ROWS, cols: int = COLS) -> Tensor:
    """Finite numbers: 127 is NaN."""
    return codes(generator(), (rows, cols), 7).clamp(max=126).to(torch.uint8).view(torch.float8_e4m3fn)


def int4_codes(rows: int = ROWS, cols: int = COLS) -> Tensor:
    return pack_rows(codes(generator(), (rows, cols), 4), 4)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def packed_settings(**more: Any) -> Config:
    scheme = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP, **more}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}


def bnb4() -> tuple[Tensors, Config]:
    weight = torch.randn(ROWS, COLS, generator=generator())
    return nf4(weight, quant_type="nf4", compress_statistics=True), config_of("bitsandbytes", load_in_4bit=True)


def int8() -> tuple[Tensors, Config]:
    parts = {"weight": codes(generator(), (ROWS, COLS), 7).to(torch.int8), "SCB": ones(ROWS)}
    return of_layer(parts | {"weight_format": torch.tensor(0, dtype=torch.uint8)}), config_of("bitsandbytes")


def fp8() -> tuple[Tensors, Config]:
    parts = {"weight": fp8_codes(), "weight_scale_inv": ones(2, 3)}
    return of_layer(parts), config_of("fp8", weight_block_size=[8, 24])


def fp8_rows() -> tuple[Tensors, Config]:
    return of_layer({"weight": fp8_codes(), "weight_scale": ones(ROWS, 1)}), config_of("fbgemm_fp8")


def packed() -> tuple[Tensors, Config]:
    parts = {
        "weight_packed": int4_codes(),
        "weight_scale": ones(ROWS, COLS // GROUP, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([ROWS, COLS]),
        "weight_zero_point": pack_rows(codes(generator(), (COLS // GROUP, ROWS), 4), 4).T,
        "weight_g_idx": torch.arange(COLS, dtype=torch.int32) // GROUP,
    }
    return of_layer(parts), config_of("compressed-tensors", **packed_settings(actorder="group"))


def nvfp4() -> tuple[Tensors, Config]:
    parts = {
        "weight": codes(generator(), (ROWS, COLS // 2), 8).to(torch.uint8),
        "weight_scale": fp8_codes(ROWS, COLS // 16),
        "weight_scale_2": ones(),
    }
    return of_layer(parts), config_of("modelopt", quant_algo="NVFP4")


def mxfp4() -> tuple[Tensors, Config]:
    parts = {
        "experts.down_proj_blocks": codes(generator(), (2, ROWS, COLS // 32, 16), 8).to(torch.uint8),
        "experts.down_proj_scales": codes(generator(), (2, ROWS, COLS // 32), 7).to(torch.uint8),
    }
    return of_layer(parts), config_of("mxfp4")


def gptq() -> tuple[Tensors, Config]:
    parts = {
        "qweight": int4_codes().T,
        "scales": scales(generator(), (COLS // GROUP, ROWS), torch.float16),
        "qzeros": pack_rows(codes(generator(), (COLS // GROUP, ROWS), 4), 4),
        "g_idx": torch.arange(COLS, dtype=torch.int32) // GROUP,
    }
    return of_layer(parts), config_of("gptq", bits=4, group_size=GROUP)


def awq() -> tuple[Tensors, Config]:
    parts = {
        "qweight": pack_awq(codes(generator(), (COLS, ROWS), 4)),
        "scales": scales(generator(), (COLS // GROUP, ROWS), torch.float16),
        "qzeros": pack_awq(codes(generator(), (COLS // GROUP, ROWS), 4)),
    }
    return of_layer(parts), config_of("awq", bits=4, group_size=GROUP, version="gemm")


KINDS: dict[str, Callable[[], tuple[Tensors, Config]]] = {
    kind.__name__: kind for kind in (bnb4, int8, fp8, fp8_rows, packed, nvfp4, mxfp4, gptq, awq)
}
# Parts that may be absent, as other parts or nothing at all then say the same.
OPTIONAL = {f"{LAYER}.weight_format", f"{LAYER}.g_idx"}
REQUIRED = [(kind, name) for kind, make in KINDS.items() for name in make()[0] if name not in OPTIONAL]


def read_all(tensors: Mapping[str, Tensor], config: Config | None) -> None:
    with opened(tensors, config) as base:
        for name in base.tensors:
            decoded(base, name)


def refused(tensors: Mapping[str, Tensor], config: Config | None, *words: str) -> None:
    """Opening, or at the latest reading, fails with a message that has all these words."""
    with pytest.raises(CheckpointError) as caught:
        read_all(tensors, config)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tables_damage_is_sound(kind: str) -> None:
    """Without damage each opens and has one weight with numbers in it."""
    tensors, config = KINDS[kind]()
    with opened(tensors, config) as base:
        (name,) = base.tensors
        weight = decoded(base, name)
        assert weight.isfinite().all()
        assert weight.count_nonzero() > weight.numel() / 2
        assert set(base.stored) == set(tensors)


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_a_missing_part_is_refused(kind: str, name: str) -> None:
    """No part of a quantised weight can be lost without a word; the message names it or what is left."""
    tensors, config = KINDS[kind]()
    del tensors[name]
    refused(tensors, config, LAYER)


# With a scale a row, and blocks of which the last is cut, one column more is no contradiction.
RESIZED = [
    (kind, name, axis)
    for kind, name in REQUIRED
    for axis in (0, -1)
    if (kind, name, axis) not in [(kind, WEIGHT, -1) for kind in ("int8", "fp8", "fp8_rows")]
]


@pytest.mark.parametrize(("kind", "name", "axis"), RESIZED)
def test_a_part_of_another_size_is_refused(kind: str, name: str, axis: int) -> None:
    """One more scale, code, codebook entry …"""
    tensors, config = KINDS[kind]()
    old = torch.atleast_1d(tensors[name])
    refused(tensors | {name: torch.cat([old, old.narrow(axis, 0, 1)], dim=axis)}, config, LAYER)


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_a_part_of_another_dtype_is_refused(kind: str, name: str) -> None:
    """The bits of a part are read as its dtype says, or not at all."""
    tensors, config = KINDS[kind]()
    old = tensors[name]
    other = torch.int16 if old.is_floating_point() or old.dtype != torch.int16 else torch.int32
    refused(tensors | {name: old.float().to(other)}, config, LAYER)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_without_a_config_are_refused_unless_they_describe_themselves(kind: str) -> None:
    """bitsandbytes says all beside its codes, FP8 with one scale a row is plain; the rest cannot be guessed."""
    tensors, config = KINDS[kind]()
    del config["quantization_config"]
    if kind in ("bnb4", "int8", "fp8_rows"):
        read_all(tensors, config)
    else:
        refused(tensors, config, LAYER)


@pytest.mark.parametrize(
    "codes_alone",
    [fp8_codes(), fp8_codes().view(torch.float8_e5m2), fp8_codes().view(torch.int8), fp8_codes().view(torch.uint8)],
    ids=lambda tensor: str(tensor.dtype),
)
@pytest.mark.parametrize("method", [None, "fp8", "compressed-tensors", "modelopt", "bitsandbytes", "gptq"])
def test_codes_alone_are_never_taken_for_numbers(codes_alone: Tensor, method: str | None) -> None:
    """Without a scale, 8-bit weights are refused under every config and under none."""
    refused({WEIGHT: codes_alone}, config_of(method, bits=4, group_size=GROUP), WEIGHT)


def text(**state: Any) -> Tensor:
    return raw(json.dumps(state).encode())


def raw(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


STATE_VALUES: dict[str, Any] = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float32",
    "shape": [ROWS, COLS],
    "nested_blocksize": 256,
    "nested_dtype": "float32",
    "nested_offset": 0.5,
}


def test_the_state_that_is_garbled_below_is_sound() -> None:
    tensors, config = bnb4()
    read_all(tensors | {STATE: text(**STATE_VALUES)}, config)


@pytest.mark.parametrize(
    "state",
    [
        raw(b"{"),
        raw(b"\xff\xfe"),
        raw(b"[]"),
        raw(b"7"),
        raw(b"[" * 4000),
        raw(json.dumps(STATE_VALUES).encode() + b" " * 5000),
        text(**STATE_VALUES).to(torch.int32),
        text(),
    ],
    ids=["cut", "not UTF-8", "list", "number", "deep", "huge", "int32", "empty"],
)
def test_a_state_that_is_no_small_json_object_is_refused(state: Tensor) -> None:
    tensors, config = bnb4()
    refused(tensors | {STATE: state}, config, STATE)


@pytest.mark.parametrize("key", [key for key in STATE_VALUES if key != "nested_dtype"])
def test_a_state_that_lacks_a_key_is_refused(key: str) -> None:
    tensors, config = bnb4()
    refused(tensors | {STATE: text(**{k: v for k, v in STATE_VALUES.items() if k != key})}, config, WEIGHT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("shape", value) for value in ([], [0, 4], [-16, -64], [16, 64.0], [True, 1024], "ab", None, 1024, {"a": 1})),
        *(("shape", value) for value in ([2**62, 2**62], [2**39] * 200, [ROWS, COLS + 1], [ROWS, COLS, 2], [1] * 300)),
        *(("blocksize", value) for value in (0, -64, 3, 63, 65, 64.0, "64", None, [64], True, 2**70, 128)),
        *(("nested_blocksize", value) for value in (-256, "256", 256.0, [256], True, 1, 2**70)),
        *(("nested_offset", value) for value in (10**400, float("nan"), float("inf"), "x", None, [1])),
        *(("dtype", value) for value in ("int8", "torch.float32", "", None, 7, ["float32"])),
        *(("quant_type", value) for value in ("fp4", "int4", None, 4)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_state_with_a_crazy_value_is_refused(key: str, value: object) -> None:
    """Negative, huge, of a wrong type: nothing is allocated for it and nothing but CheckpointError comes out."""
    tensors, config = bnb4()
    refused(tensors | {STATE: text(**STATE_VALUES | {key: value})}, config, WEIGHT)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*STATE_VALUES]), strategies.json_values()))
@example({"blocksize": 64.0})
def test_any_state_decodes_or_is_refused(changes: dict[str, Any]) -> None:
    tensors, config = bnb4()
    try:
        read_all(tensors | {STATE: text(**STATE_VALUES | changes)}, config)
    except CheckpointError as error:
        assert WEIGHT in str(error)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("packed", {"weight_shape": torch.tensor([ROWS, -COLS])}),
        ("packed", {"weight_shape": torch.tensor([2**62, 2**62])}),
        ("packed", {"weight_shape": torch.tensor([0, COLS])}),
        ("packed", {"weight_shape": torch.tensor([COLS, ROWS])}),
        ("packed", {"weight_shape": torch.tensor([ROWS, COLS - GROUP])}),
        ("packed", {"weight_shape": torch.tensor([ROWS, COLS, 1])}),
        ("packed", {"weight_shape": torch.tensor([float(ROWS), COLS])}),
        ("packed", {"weight_g_idx": torch.full((COLS,), -1, dtype=torch.int32)}),
        ("packed", {"weight_g_idx": torch.full((COLS,), COLS // GROUP, dtype=torch.int32)}),
        ("gptq", {"g_idx": torch.full((COLS,), -1, dtype=torch.int32)}),
        ("gptq", {"g_idx": torch.full((COLS,), COLS // GROUP, dtype=torch.int64)}),
        ("gptq", {"g_idx": torch.zeros(COLS - 1, dtype=torch.int32)}),
        ("int8", {"weight_format": torch.tensor(2, dtype=torch.uint8)}),
        ("fp8_rows", {"weight": fp8_codes().view(2, ROWS // 2, COLS)}),
        ("fp8_rows", {"weight": fp8_codes()[:0], "weight_scale": ones(1)}),
        ("mxfp4", {"experts.down_proj_blocks": torch.zeros(2, ROWS, COLS // 32, 8, dtype=torch.uint8)}),
        ("awq", {"qweight": torch.zeros(COLS, 0, dtype=torch.int32)}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_values_that_cannot_be_are_refused(kind: str, changes: Tensors) -> None:
    """Negative, huge and empty sizes, groups that are not there, an order of codes that is not read."""
    tensors, config = KINDS[kind]()
    name = "weight" if kind == "awq" else next(iter(changes))
    refused(tensors | of_layer(changes), config, f"{LAYER}.{name}")


@pytest.mark.parametrize(
    ("kind", "settings_", "named"),
    [
        ("fp8", {"weight_block_size": [8, 64]}, "weight_scale_inv"),
        ("fp8", {"weight_block_size": None}, "weight_scale_inv"),
        ("packed", packed_settings(group_size=16), "weight_scale"),
        ("packed", packed_settings(group_size=48), "weight_scale"),
        ("packed", packed_settings(group_size=None, strategy="channel"), "weight_scale"),
        ("packed", packed_settings(num_bits=8), "weight_packed"),
        ("packed", packed_settings(type="float"), "weight_packed"),
        ("packed", {"config_groups": {}}, "weight_packed"),
        ("gptq", {"bits": 8}, "scales"),
        ("gptq", {"bits": 2}, "scales"),
        ("gptq", {"group_size": 64}, "scales"),
        ("gptq", {"group_size": -1}, "scales"),
        ("awq", {"group_size": 16}, "scales"),
        ("awq", {"group_size": 48}, "qweight"),
        ("awq", {"group_size": -1}, "scales"),
    ],
)
def test_a_config_that_its_tensors_contradict_is_refused(kind: str, settings_: Config, named: str) -> None:
    """Other groups, blocks or bits than the sizes have would give wrong numbers without a sign of it."""
    tensors, config = KINDS[kind]()
    config["quantization_config"] |= settings_
    refused(tensors, config, f"{LAYER}.{named}")


def test_a_group_size_that_gives_as_many_scales_is_refused_too() -> None:
    """48 and 32 both cut 64 inputs in two: without g_idx nothing but the config says which."""
    tensors, config = gptq()
    del tensors[f"{LAYER}.g_idx"]
    read_all(tensors, config)
    config["quantization_config"]["group_size"] = 48
    refused(tensors, config, f"{LAYER}.qweight")


def test_a_group_of_more_than_half_of_a_row_is_refused() -> None:
    """One scale a row with groups of 48 of 64: for the last 16 columns there is none."""
    tensors, config = packed()
    del tensors[f"{LAYER}.weight_zero_point"], tensors[f"{LAYER}.weight_g_idx"]
    tensors[f"{LAYER}.weight_scale"] = ones(ROWS, 1)
    config["quantization_config"] |= packed_settings(group_size=COLS, symmetric=True)
    read_all(tensors, config)
    config["quantization_config"] |= packed_settings(group_size=48, symmetric=True)
    refused(tensors, config, f"{LAYER}.weight_scale")


def test_a_row_of_no_columns_is_refused() -> None:
    """Also where a group is a row, of whatever length."""
    tensors, config = packed()
    tensors[f"{LAYER}.weight_shape"] = torch.tensor([ROWS, 0])
    config["quantization_config"] |= packed_settings(group_size=-1)
    refused(tensors, config, f"{LAYER}.weight_shape")


def test_zeros_and_order_that_the_config_promises_must_be_there() -> None:
    """An asymmetric weight without zeros is not a symmetric one; int8 codes neither."""
    tensors, config = packed()
    del tensors[f"{LAYER}.weight_zero_point"]
    refused(tensors, config, f"{LAYER}.weight_zero_point")
    args = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    plain = of_layer({"weight": torch.ones(ROWS, COLS, dtype=torch.int8), "weight_scale": ones(ROWS, 1)})
    config = config_of("compressed-tensors", config_groups={"group_0": {"weights": args}})
    refused(plain, config, f"{LAYER}.weight_zero_point")


UNREAD = ["hqq", "aqlm", "quanto", "torchao", "eetq", "spqr", "vptq", "bitnet", "higgs", "auto-round", "fp_quant",
          "quark", "mxfp8", "nvfp4", "sinq", "metal", "fouroversix", "gguf", "exl3", "No Such Thing"]  # fmt: skip


@pytest.mark.parametrize("method", UNREAD)
def test_a_method_that_is_not_read_is_refused_by_its_name(method: str) -> None:
    """Even if its tensors look like those of another method."""
    for kind in KINDS.values():
        refused(kind()[0], config_of(method, bits=4, group_size=GROUP), method.lower())


@pytest.mark.parametrize(
    ("kind", "settings_", "named"),
    [
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"version": "gemv_fast"}, "gemv_fast"),
        ("awq", {"backend": "llm-awq"}, "llm-awq"),
        ("awq", {"bits": 8}, "8 bits"),
        ("awq", {"group_size": None}, "group_size"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"is_marlin_format": True}, "marlin"),
        ("gptq", {"format": "bitblas"}, "bitblas"),
        ("gptq", {"checkpoint_format": "gptq", "format": "gptq_v2"}, "gptq_v2"),
        ("gptq", {"bits": 5}, "5 bits"),
        ("gptq", {"bits": 4.0}, "4.0 bits"),
        ("gptq", {"bits": "4"}, "4 bits"),
        ("gptq", {"group_size": 0}, "group_size"),
        ("gptq", {"group_size": -2}, "group_size"),
        ("gptq", {"group_size": 10**39}, "group_size"),
        ("fp8", {"weight_block_size": [0, 8]}, "block"),
        ("fp8", {"weight_block_size": [-8, 24]}, "block"),
        ("fp8", {"weight_block_size": [8, 24, 1]}, "block"),
        ("fp8", {"weight_block_size": "8x24"}, "block"),
        ("fp8", {"weight_block_size": [10**39, 24]}, "block"),
        ("packed", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("packed", {"config_groups": ["W4A16"]}, "config_groups"),
        ("packed", {"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
        ("packed", {"config_groups": {"group_0": {"weights": "int4"}}}, "num_bits"),
        ("packed", packed_settings(num_bits="4"), "num_bits"),
        ("packed", packed_settings(num_bits=-4), "num_bits"),
        ("packed", packed_settings(group_size=-3), "group_size"),
        ("packed", packed_settings(block_structure="2x4"), "block size"),
    ],
)
def test_a_layout_that_is_not_read_is_refused_by_its_name(kind: str, settings_: Config, named: str) -> None:
    tensors, config = KINDS[kind]()
    config["quantization_config"] |= settings_
    refused(tensors, config, named)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from([*KINDS]))
def test_any_config_decodes_or_is_refused(data: st.DataObject, kind: str) -> None:
    """Strangers' JSON in the place of any setting, and beside them."""
    tensors, config = KINDS[kind]()
    values = config["quantization_config"]
    keys = [*values, "bits", "group_size", "weight_block_size", "config_groups", "format", "version", "meta"]
    garbage = st.recursive(
        strategies.json_values() | st.integers(-10, 100) | st.sampled_from([-1, 4, 8, 32]),
        lambda inner: st.dictionaries(
            st.sampled_from(
                ["group_0", "weights", "num_bits", "group_size", "actorder", "quantizer", "block_structure"]
            ),
            inner,
        ),
        max_leaves=8,
    )
    values |= data.draw(st.dictionaries(st.sampled_from([key for key in keys if key != "quant_method"]), garbage))
    try:
        read_all(tensors, config)
    except CheckpointError as error:
        assert len(str(error)) < 3000


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"model.norm.{part}", ones(4))
        for part in ("weight_scale", "weight_scale_inv", "weight_scale_2", "scales", "absmax", "SCB", "pre_quant_scale")
    ]
    + [
        ("model.norm.weight_packed", torch.ones(4, 4, dtype=torch.int32)),
        ("model.norm.qzeros", torch.ones(4, 4, dtype=torch.int32)),
        ("model.experts.down_proj_blocks", ones(4)),
        ("model.experts.down_proj", fp8_codes()),
        ("model.norm.weight.compressed", ones(4)),
        ("model.norm.weight.quant_state.bitsandbytes__int4", torch.ones(4, dtype=torch.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_leftovers_of_a_quantised_weight_are_refused(kind: str, name: str, tensor: Tensor) -> None:
    """A scale whose weight is plain, or whose name another format uses: what it scales cannot be known."""
    tensors, config = KINDS[kind]()
    refused(tensors | {name: tensor}, config, name.removesuffix("_packed"))


@pytest.mark.parametrize("kind", ["packed", "mxfp4", "gptq", "awq"])
def test_a_weight_stored_plain_and_quantised_is_refused(kind: str) -> None:
    """Which of the two counts is not said."""
    tensors, config = KINDS[kind]()
    with opened(tensors, config) as base:
        (name,) = base.tensors
    refused(tensors | {name: torch.zeros(ROWS, COLS)}, config, name)


def test_two_states_of_one_weight_are_refused() -> None:
    """The same codes as NF4 and as FP4."""
    tensors, config = bnb4()
    other = text(**STATE_VALUES | {"quant_type": "fp4"})
    refused(tensors | {f"{WEIGHT}.quant_state.bitsandbytes__fp4": other}, config, WEIGHT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["top", "text_config", "compression_config"])
def test_what_is_not_quantised_stays_and_what_is_of_the_runtime_is_set_aside(kind: str, level: str) -> None:
    """Modules that the config leaves out are plain; static scales of activations and caches have no weight."""
    tensors, config = KINDS[kind]()
    plain = {
        "lm_head.weight": torch.randn(8, 4),
        "model.norm.weight": ones(4),
        "model.layers.0.mlp.up_proj.bias": ones(4),
    }
    runtime = ["mlp.up_proj.input_scale", "mlp.up_proj.input_global_scale", "self_attn.k_scale", "self_attn.v_scale",
               "mlp.up_proj.input_scale_ub", "self_attn.k_proj.output_scale", "self_attn.kv_scale"]  # fmt: skip
    aside = {f"model.layers.0.{name}": ones(1) for name in runtime}
    values = config.pop("quantization_config") | {"modules_to_not_convert": ["lm_head"], "ignore": ["lm_head"]}
    if level == "text_config":
        config["text_config"] = {"quantization_config": values}
    else:
        config["quantization_config" if level == "top" else level] = values
    with opened(tensors | plain | aside, config) as base:
        assert set(base.aside) == set(aside)
        assert set(plain) < set(base.tensors)
        assert len(base.tensors) == len(plain) + 1
        assert torch.equal(decoded(base, "lm_head.weight"), plain["lm_head.weight"])
        assert base.is_quantised


def test_a_plain_model_keeps_tensors_that_only_sound_quantised() -> None:
    """Without a quantised weight or a config of one, `scales` and `k_scale` are names like others."""
    tensors = {"model.router.scales": ones(4), "model.attn.k_scale": ones(1), "model.head.weight": ones(4, 4)}
    for config in (config_of(None), None):
        with opened(tensors, config) as base:
            assert set(base.tensors) == set(tensors)
            assert not base.is_quantised


def test_a_message_stays_short() -> None:
    """A stranger's text is cut before it is repeated."""
    tensors, config = bnb4()
    with pytest.raises(CheckpointError, match=re.escape(STATE)) as caught:
        read_all(tensors | {STATE: text(**STATE_VALUES | {"dtype": "x" * 3000})}, config)
    assert len(str(caught.value)) < 1000
