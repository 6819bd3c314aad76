"""The table of names is that of the installed transformers, and says what transformers does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

from architectures import ARCHITECTURES
from loraweld.errors import MatchError
from loraweld.naming.architecture import declared_ties, parts
from loraweld.naming.conversions import Conversion, conversions, trained_names
from loraweld.naming.names import Names
from loraweld.naming.tied import Tie, find_ties

ROOT = Path(__file__).parents[1]
# Classes of several models, some of them with rows of their own, and rows of every kind.
COMPOSITES = (
    *("Blip2ForConditionalGeneration", "ColPaliForRetrieval", "CLIPSegForImageSegmentation"),
    *("Kimi_K25ForConditionalGeneration", "LlavaOnevisionForConditionalGeneration", "MaskFormerModel", "MimiModel"),
    *("MllamaForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration", "SegformerForSemanticSegmentation"),
    *("ShieldGemma2ForImageClassification", "VisionEncoderDecoderModel", "VoxtralForConditionalGeneration"),
)


def script() -> ModuleType:
    """Return the script that makes the table, as a module."""
    spec = importlib.util.spec_from_file_location("make_naming_table", ROOT / "scripts" / "make_naming_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return script()


@pytest.fixture(scope="module")
def table(maker: ModuleType) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(maker.TABLE.read_text())
    return written


def test_table_is_that_of_the_installed_transformers(maker: ModuleType, table: dict[str, Any]) -> None:
    """Rows, defaults and, of the classes, those that are tested below; all of them would take a minute."""
    advice = "run scripts/make_naming_table.py"
    assert table["transformers"] == tf.__version__, advice
    rows = json.loads(json.dumps(maker.all_rows()))
    assert table["rows"] == rows, advice
    assert table["bases"] == maker.base_classes(), advice
    assert table["untied"] == maker.untied_types(), advice
    for cls in {architecture.model for architecture in ARCHITECTURES}:
        assert table["classes"].get(cls.__name__, {}) == maker.one_class(cls, rows), f"{cls.__name__}: {advice}"


@pytest.mark.parametrize("name", COMPOSITES)
def test_names_are_those_that_transformers_gives(name: str, maker: ModuleType) -> None:
    """The rows of a class and of the models in it are transformers' own, in its order, and do the same to names."""
    model = maker.build(getattr(tf, name))
    config = {**model.config.to_dict(), "architectures": [name]}
    rows, theirs = conversions(config), get_model_conversion_mapping(model)
    assert [(row.find.pattern, list(row.put)) for row in rows] == [
        (row.compiled_sources.pattern, row.target_patterns) for row in theirs
    ]

    parameters = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    stored = list(revert_weight_conversion(model, parameters))
    renamings = [row for row in theirs if isinstance(row, WeightRenaming)]
    for names in (stored, list(parameters)):
        ours = trained_names(names, rows)
        assert {name: ours.get(name, name) for name in names} == {
            name: rename_source_key(name, renamings, [])[0] for name in names
        }


def test_converters_are_data() -> None:
    """A converter says which patterns on disk make which in memory, and how; it renames nothing."""
    rows = conversions({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"})
    experts = next(row for row in rows if not row.is_renaming)
    assert experts.disk == ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")
    assert experts.memory == ("mlp.experts.gate_up_proj",)
    assert experts.operations == ({"name": "MergeModulelist", "dim": 0}, {"name": "Concatenate", "dim": 1})
    assert isinstance(experts, Conversion)
    assert trained_names(["model.layers.0.mlp.experts.0.gate_proj.weight"], rows) == {}


LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}


def test_models_inside_are_of_the_class_that_their_config_says() -> None:
    """And get that class's rows, under the path that they have in the whole."""
    config = {**LLAVA, "vision_config": {"model_type": "vit"}, "text_config": {"model_type": "qwen3_5_text"}}
    assert {part.path: part.class_name for part in parts(config) if part.path.count(".")} == {
        "model.vision_tower": "ViTModel",
        "model.language_model": "Qwen3_5TextModel",
    }
    stored = [f"{tower}.encoder.layer.0.output.dense.weight" for tower in ("vision_tower", "language_model.model")]
    renamed = {Names(stored, config).in_memory(name) for name in stored}
    assert renamed == {
        "model.vision_tower.layers.0.mlp.fc2.weight",
        "model.language_model.encoder.layer.0.output.dense.weight",
    }


def test_ties_of_a_language_model_inside_are_those_of_its_class() -> None:
    """BLIP-2 with T5 in the place of OPT: the embeddings of T5's two sides are the shared ones."""
    config: dict[str, Any] = {"architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2"}
    config |= {"text_config": {"model_type": "t5"}}
    assert {name for _, pairs in declared_ties(config) for name in pairs} == {
        *("language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"),
        "language_model.lm_head.weight",
    }
    shared = "language_model.shared.weight"
    assert Tie("language_model.decoder.embed_tokens.weight", shared) in find_ties([shared], config)


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"], ids=["model", "causal"]
)
def test_adapter_of_a_text_model_fits_the_model_that_also_sees(name: str) -> None:
    """It was trained alone, so its paths lack those of the whole."""
    stored = ["language_model.model.layers.0.self_attn.q_proj.weight", "vision_tower.x.weight"]
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    assert Names(stored, config).find(name) == stored[0]


KIMI = {"architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25"}


@pytest.mark.parametrize("first", [0, 1], ids=["as published", "as converted"])
def test_rows_that_hold_together_leave_a_converted_checkpoint_as_it_is(first: int) -> None:
    """norm0 and norm1 become norm1 and norm2; where there is no norm0, norm1 stays."""
    stored = [f"vision_tower.encoder.blocks.0.norm{first + number}.weight" for number in (0, 1)]
    names = Names(stored, KIMI)
    in_memory = [f"model.vision_tower.layers.0.norm{number}.weight" for number in (1, 2)]
    assert [names.find(name) for name in in_memory] == stored


def test_tensor_under_its_old_and_its_new_name_is_refused() -> None:
    stored = [f"{prefix}visual.blocks.0.attn.proj.weight" for prefix in ("", "model.")]
    names = Names(stored, {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"})
    with pytest.raises(MatchError, match=r"fits several tensors of the base: model\.visual.*, visual"):
        names.find(stored[1])


def test_two_models_inside_that_fit_equally_well_are_named() -> None:
    stored = [f"model.{tower}.layers.0.mlp.fc1.weight" for tower in ("vision_tower", "language_model")]
    with pytest.raises(MatchError, match=r"language_model.*vision_tower"):
        Names(stored, LLAVA).find("layers.0.mlp.fc1.weight")
