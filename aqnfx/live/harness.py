"""lm-evaluation-harness on an instrumented model: its tasks, our noise, and no answers from a cache."""

from __future__ import annotations

from typing import Any

from aqnfx.errors import InputError
from aqnfx.live.instrument import Handle


def harness_lm(handle: Handle, tokenizer: Any, **options: Any) -> Any:
    """Return an ``HFLM`` of lm-evaluation-harness that runs the instrumented model of ``handle``, for ``simple_evaluate``.

    ``options`` are those of ``HFLM`` but ``pretrained`` and ``tokenizer``. A cache of answers (``use_cache``) is refused: its
    keys know nothing of noise, so that it would give the answers of other noise, or of none. Raises :class:`InputError` for
    that, and where the harness is not installed; :class:`~aqnfx.errors.LiveError` for a handle that was removed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError("lm-evaluation-harness is not installed; pip install 'aqnfx[harness]'") from error

    class NoisyLM(HFLM):  # type: ignore[misc]
        def set_cache_hook(self, cache_hook: Any) -> None:
            raise InputError(
                "use_cache was asked: the harness knows an answer by its prompt alone, so the cache would answer for a model "
                "with noise what one without said, or one with other noise; leave it out (cache_requests is fine)"
            )

    return NoisyLM(pretrained=handle.model, tokenizer=tokenizer, **options)
