"""Every error that aqnfx raises on purpose.

A message says what was asked, what was found, and what to try. The command line prints it as one line and exits with
``exit_code``; library users can catch :class:`AqnfxError` or the subclass.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class AqnfxError(Exception):
    """Base of every error that aqnfx raises on purpose; ``exit_code`` is what the command line exits with."""

    exit_code: int = 2


class InputError(AqnfxError):
    """A file, option or argument from outside is missing, malformed, empty or out of range."""


class Interrupted(InputError):
    """A run was interrupted before it had anything to report."""

    exit_code = 130


class ModelError(AqnfxError):
    """A model could not be loaded, or is not of a form that the request can work on."""


class TraceError(AqnfxError):
    """``torch.export`` could not trace the model."""


class SelectorError(AqnfxError):
    """A selector names something that the model does not have, or does not parse."""


class LiveError(AqnfxError):
    """A live model cannot be instrumented, was instrumented before, or its handle was removed."""


class PassError(AqnfxError):
    """A pass cannot run on this program: an order violated, an option out of range, nothing matched."""


class VerificationError(AqnfxError):
    """A pass left a graph that breaks a legality rule; the message shows the neighbourhood of the offending node."""


class ProbeError(AqnfxError):
    """A probe did not measure what was asked: it never fired, or produced values that are not finite."""


class ArtifactError(AqnfxError):
    """A saved artifact is truncated, of another schema, or belongs to another model, data set or configuration."""


class ExportError(AqnfxError):
    """What was exported could not be read back by its target, or is not what the plan says."""


class NotYetError(AqnfxError):
    """The request is understood and planned, and this version cannot do it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x', 'y'?"`` for the known names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 78


def brief(value: object) -> str:
    """Return a value as a message shows it, in one line of at most 80 characters: long ones by beginning and end."""
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return printable(text if len(text) <= 80 else text[:79] + "…")


def printable(text: str) -> str:
    """Return ``text`` with control characters written out: names from files must not steer a terminal or break a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
