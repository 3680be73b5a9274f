"""Which trace serves sequences of given lengths: models that loop over positions or chunks of them hold for some only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from aqnfx.graph.frontend import trace
from aqnfx.graph.program import Program


def trace_for(model: nn.Module | str | Path, lengths: Iterable[int], **how: Any) -> Program:
    """Trace a model as :func:`aqnfx.trace` does by itself; where that excludes a length, at the longest of ``lengths``.

    ``lengths`` are in tokens, none for no wish; ``how`` are options of :func:`aqnfx.trace`. The result depends on the model
    and on the lengths alone, so that a map and what reads it later have the same sites.
    """
    wanted = frozenset(lengths)
    program = trace(model, **how)
    if serves(program, wanted) or str(model).endswith(".pt2"):
        return program
    return trace(model, sequence_length=max(wanted), **how)


def serves(program: Program, lengths: Iterable[int]) -> bool:
    """Return whether every one of ``lengths`` is within what the trace holds for; a model without tokens serves all."""
    domain = program.domain
    if domain is None or "input_ids" not in domain.names:
        return True
    return all(domain.holds_at("input_ids", 1, length) for length in set(lengths))


def recorded(provenance: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the longest length that the run of a map or a plan recorded, as lengths to trace for; none where there is none."""
    data = provenance.get("data")
    found = provenance.get("max_length", data.get("max_length") if isinstance(data, Mapping) else None)
    return (found,) if isinstance(found, int) and found > 0 else ()
