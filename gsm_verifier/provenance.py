"""What made a result: the commit, the packages, the machine's part that matters."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

UNKNOWN = "unknown"
PACKAGES = (
    "gsm_verifier",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "grain",
    "tokenizers",
    "pyarrow",
)


def commit() -> str:
    """The source's git commit, "-dirty" if files were changed; `UNKNOWN` outside a checkout."""
    source = Path(__file__).parent
    command = [
        "git",
        "-C",
        str(source),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
