"""With what a run is computed: the part of config.json that no flag sets."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist

PACKAGES = ("pr1", "torch", "transformers", "triton", "tokenizers", "numpy", "pillow", "flash-attn", "liger-kernel")


def environment() -> dict:
    """Git hash of this checkout (None outside one), versions, name of the device, number of processes."""
    versions = {name: _version(name) for name in PACKAGES}
    together = dist.is_available() and dist.is_initialized()
    return {
        **_git(),
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "world_size": dist.get_world_size() if together else 1,
        "image_backend": "pil",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.machine()


def _git() -> dict:
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != here.parent:  # installed somewhere inside another project's checkout
        return {"git_hash": None, "git_dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"git_hash": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}
