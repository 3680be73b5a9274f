"""The files that ship inside the package: a small trained model and the problems it is scored on."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from aqnfx.errors import ArtifactError

__all__ = ["EMBEDDED", "embedded_model", "embedded_problems"]

EMBEDDED = "tinygsm"
"""The name of the model that comes with the package."""


def embedded_model() -> Path:
    """Return the directory of the embedded model; ``from_pretrained`` loads it.

    Raises :class:`~aqnfx.errors.ArtifactError` when the installation lacks it.
    """
    return _resource("tinygsm", "config.json").parent


def embedded_problems() -> Path:
    """Return the embedded model's held-out problems: JSON lines with ``question`` and ``answer`` strings.

    Raises :class:`~aqnfx.errors.ArtifactError` when the installation lacks them.
    """
    return _resource("tinygsm", "problems.jsonl")


def _resource(*parts: str) -> Path:
    # The package is always a real directory (pip unpacks wheels), so a resource is a path.
    path = Path(str(files(__name__).joinpath(*parts)))
    if not path.is_file():
        raise ArtifactError(f"embedded data: {path} is missing; the installation is incomplete, reinstall aqnfx")
    return path
