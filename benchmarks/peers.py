"""Other tools that merge a LoRA, each from an environment of its own that `make bench-peers` makes.

mergekit 0.1.5: `mergekit-yaml` on `base+adapter`. axolotl 0.19.0: the function behind the memory-efficient
`axolotl merge-lora`, called alone, since its command line wants the whole training stack installed.
"""

from __future__ import annotations

import json
from pathlib import Path

from cases import Case, free_bytes
from measuring import GB, REPO

ENVIRONMENTS = REPO / ".cache" / "peers"
AXOLOTL_MERGE = """\
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(*sys.argv[1:])
"""


def add_peers(case: Case, work: Path) -> None:
    """Add the command of each peer that is installed, "{out}" standing for its output, and has room on the disk."""
    made = {"mergekit": mergekit(case.base, case.adapter, work), "axolotl": axolotl(case.base, case.adapter)}
    for tool, command in made.items():
        if Path(command[0]).exists():
            case.commands[tool] = command
    needed = 2.1 * case.base_bytes  # the merged model twice: mergekit keeps it on the way
    if "mergekit" in case.commands and free_bytes(work) < needed:
        case.failures["mergekit"] = f"needs {needed / GB:.0f} GB of disk"


def mergekit(base: Path, adapter: Path, work: Path) -> list[str]:
    """Return its command; what it keeps of the merged model on the way goes with the output."""
    recipe = work / f"mergekit-{adapter.name}.yaml"  # JSON is YAML
    model = {"model": f"{base}+{adapter}"}
    recipe.write_text(json.dumps({"models": [model], "merge_method": "passthrough", "dtype": "bfloat16"}))
    program = ENVIRONMENTS / "mergekit" / "bin" / "mergekit-yaml"
    options = ["--lora-merge-cache", "{out}/.lora", "--no-copy-tokenizer", "--lazy-unpickle"]
    return [str(program), str(recipe), "{out}", *options]


def axolotl(base: Path, adapter: Path) -> list[str]:
    """Return its command."""
    program = ENVIRONMENTS / "axolotl" / "bin" / "python"
    return [str(program), "-c", AXOLOTL_MERGE, str(base), str(adapter), "{out}"]
