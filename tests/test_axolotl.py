"""Beside axolotl's own merge: the same adapters, the same weights, as `docs/how-to/from-axolotl.md` says.

axolotl lives in an environment of its own, which `make bench-peers` makes; without it these tests are skipped, loudly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor

import loraweld
from fakes import load_folder
from test_behaviour import save_model

PYTHON = Path(__file__).parent.parent / ".cache" / "peers" / "axolotl" / "bin" / "python"
MERGE = """\
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(*sys.argv[1:4], simulate_nf4=sys.argv[4] == "nf4")
"""
LINEARS = ["q_proj", "v_proj", "gate_proj", "down_proj"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="NO MERGE OF AXOLOTL IS COMPARED: axolotl is not installed; make bench-peers does it",
    ),
]


def trained(folder: Path, **options: Any) -> tuple[Path, Path]:
    """Write a base, and the folder that a training leaves: adapter, tokenizer, config and a checkpoint."""
    base, output = save_model(folder / "base"), folder / "lora-out"
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(output)
    shutil.copytree(output, output / "checkpoint-5")
    tf.AutoTokenizer.from_pretrained(base).save_pretrained(output)
    shutil.copy(base / "config.json", output)
    return base, output


def merged_by_axolotl(base: Path, adapter: Path, output: Path, *, nf4: bool = False) -> dict[str, Tensor]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if nf4:  # ours, since axolotl's environment has only what its merge imports otherwise
        import bitsandbytes

        packages = output.parent / "packages"
        packages.mkdir()
        found = Path(bitsandbytes.__file__).parent
        for path in (found, *found.parent.glob("bitsandbytes-*.dist-info")):
            (packages / path.name).symlink_to(path)
        environment["PYTHONPATH"] = str(packages)
    line = [PYTHON, "-c", MERGE, base, adapter, output, "nf4" if nf4 else "plain"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_folder(output)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["lora", "rslora", "modules_to_save"],
)
def test_the_weights_are_those_of_axolotl(options: dict[str, Any], tmp_path: Path) -> None:
    """But for single elements that lie half-way; its merge holds too, and a checkpoint is an adapter like the last."""
    base, adapter = trained(tmp_path, **options)
    theirs = merged_by_axolotl(base, adapter, adapter / "merged")
    loraweld.merge(adapter, output=tmp_path / "ours")
    ours = load_folder(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    assert differing <= 1e-4 * sum(tensor.numel() for tensor in ours.values())
    assert loraweld.verify(adapter / "merged", base=base, adapter=adapter).holds
    loraweld.merge(adapter / "checkpoint-5", output=tmp_path / "checkpoint")
    found = load_folder(tmp_path / "checkpoint")
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_dora_of_axolotl_is_less_exact(tmp_path: Path) -> None:
    """Its values are near, but more than one step from float64; ours are not."""
    base, adapter = trained(tmp_path, use_dora=True)
    theirs = merged_by_axolotl(base, adapter, adapter / "merged")
    loraweld.merge(adapter, output=tmp_path / "ours", verify=True)
    ours = load_folder(tmp_path / "ours")
    for name, tensor in ours.items():
        assert (tensor.float() - theirs[name].float()).norm() < 0.01 * tensor.float().norm()
    found = loraweld.verify(adapter / "merged", base=base, adapter=adapter).findings
    assert found
    assert all("imprecise" in finding.message for finding in found)


def test_what_axolotl_makes_of_qlora_is_quantized_from(tmp_path: Path) -> None:
    """Linear layers bit for bit; embeddings and head stay as they are here, and go through NF4 there."""
    base, adapter = trained(tmp_path)
    theirs = merged_by_axolotl(base, adapter, tmp_path / "theirs", nf4=True)
    loraweld.merge(adapter, output=tmp_path / "ours", merge_base="quantized-from")
    ours, stored = load_folder(tmp_path / "ours"), load_folder(base)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == tables
    assert all(torch.equal(ours[name], stored[name]) for name in tables)
