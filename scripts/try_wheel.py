"""Install the wheel in dist/ into a fresh environment and use it: help, a merge, a report.

Dependencies are those of the interpreter that runs this; the package itself comes from the wheel alone.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
WHERE = "import loraweld; print(loraweld.__file__)"


class Failure(Exception):
    """The wheel is not as it should be."""


def find_wheel() -> Path:
    """Return the one wheel in dist/."""
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise Failure(f"dist/ holds {len(wheels)} wheels, expected one; run `make dist`")
    return wheels[0]


def check_contents(wheel: Path) -> None:
    """Every file of the package is in the wheel, with the licence, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    info = {name for name in names if ".dist-info/" in name}
    if names - info != package:
        raise Failure(f"the wheel and src/ differ: {sorted((names - info) ^ package)}")
    if not any(name.endswith("/licenses/LICENSE") for name in info):
        raise Failure("the wheel has no licence")


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment with the wheel in it and return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = programs / "python"
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", wheel])
    own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    found = Path(run([python, "-c", WHERE], cwd=folder).strip())
    if not found.resolve().is_relative_to(folder.resolve()):
        raise Failure(f"loraweld is imported from {found}, not from the wheel")
    return programs


def make_inputs(folder: Path) -> None:
    """Write a tiny base and an adapter as transformers and PEFT do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft.save_pretrained(folder / "adapter")


def run(command: list[str | Path], *, cwd: Path | None = None) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def use(programs: Path, folder: Path) -> None:
    """Run the commands that touch code, data files and the template of the installed package."""
    loraweld = programs / "loraweld"
    if "merge" not in run([loraweld, "--help"], cwd=folder):
        raise Failure("loraweld --help does not name its commands")
    print(run([loraweld, "merge", "adapter", "--base", "base", "-o", "out"], cwd=folder), end="")
    print(run([loraweld, "report", "out", "-o", "report.html"], cwd=folder), end="")


def main() -> int:
    """Try the wheel; the exit code says whether it works."""
    try:
        wheel = find_wheel()
        check_contents(wheel)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            programs = install(wheel, place / "venv")
            make_inputs(place)
            use(programs, place)
    except Failure as failure:
        print(f"the wheel failed: {failure}")
        return 1
    print(f"{wheel.name} works")
    return 0


if __name__ == "__main__":
    sys.exit(main())
