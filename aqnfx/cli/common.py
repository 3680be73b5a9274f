"""What several commands share in reading their options."""

from __future__ import annotations

MISSING_HELP = "Names or globs of tensors, with commas, in which the checkpoint may differ from the model."


def words(text: str | None) -> tuple[str, ...]:
    """Return the parts of a text with commas, none for None."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
