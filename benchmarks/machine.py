"""What the numbers depend on: hardware, kernel, file system, versions, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from measuring import REPO

OTHERS = ("transformers", "peft", "safetensors", "bitsandbytes", "compressed-tensors")


def machine(work: Path) -> str:
    """Return what the numbers depend on: hardware, kernel, file system, versions, date and command."""
    rows = {
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "file system": output_of("df", "--output=fstype", str(work))[-1],
        "cp": output_of("cp", "--version")[0],
        "Python": platform.python_version(),
        **{name: version(name) for name in ("loraweld", "torch", "numpy", *OTHERS)},
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "command": f"`{command_line()}`",
    }
    return "\n".join(f"- {name}: {value}" for name, value in rows.items())


def output_of(*command: str) -> list[str]:
    """Return the lines that a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.splitlines() or ["unknown"]


def version(package: str) -> str:
    """Return the version of an installed package, of ours from the checkout."""
    if package == "loraweld":
        lines = (REPO / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version"))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """Return the model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def command_line() -> str:
    """Return the command as given, absolute paths shortened to their last part."""
    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/bench.py", *arguments])
