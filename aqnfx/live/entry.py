"""What ``torch.compile(model, backend="aqnfx")`` finds: the backend under its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from aqnfx.errors import InputError
from aqnfx.live.backend import FAST, INNER, PIPELINE, Backend

_OPTIONS = {"pipeline": PIPELINE, "inner": INNER[0], "fast": FAST}


def aqnfx(
    module: GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Rewrite a graph by ``options["pipeline"]`` and hand it to ``options["inner"]``; see :class:`Backend`.

    Levels are what the pipeline says: to steer a model while it runs, use :func:`aqnfx.instrument`, or a
    :class:`~aqnfx.live.backend.Backend` of its own. Raises :class:`InputError` for unknown options.
    """
    given = dict(options or {})
    if unknown := sorted(set(given) - set(_OPTIONS)):
        raise InputError(f"the backend aqnfx has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}")
    made = Backend(**(_OPTIONS | given))
    return made(module, examples)


