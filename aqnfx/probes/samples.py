"""From a data file or Python values to the encoded samples that a run measures on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aqnfx.errors import InputError, ModelError
from aqnfx.graph.loading import EMBEDDED
from aqnfx.probes.data import DataWarning, Encoded, Example, encode, load_examples
from aqnfx.probes.examples import example_from_record
from aqnfx.probes.tasks import ANSWERED


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a local directory, a hub id or ``"tinygsm"``; raises :class:`ModelError`."""
    import transformers

    from aqnfx.data import embedded_model

    path = str(embedded_model()) if name == EMBEDDED and not Path(name).exists() else name
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # each tokenizer back end raises its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot load the tokenizer of {name!r}: {reason.strip()}") from error


def load_samples(
    data: str | Path | Sequence[str | Mapping[str, str]],
    tokenizer: Any,
    *,
    samples: int,
    max_length: int,
    task: str = "kl",
    text_field: str | None = None,
    pack: bool = True,
) -> tuple[tuple[Encoded, ...], tuple[str, ...]]:
    """Return up to ``samples`` encoded samples of at most ``max_length`` tokens, and notes on what was left out.

    ``data`` is a file (JSON lines, parquet or text, see :func:`~aqnfx.probes.data.load_examples`), or texts and
    records with ``question`` / ``answer`` or ``text``. Plain texts are joined and cut into samples of ``max_length``
    tokens unless ``pack`` is off. For the tasks ``exact_match`` and ``generate`` samples without a whole answer are left
    out. Raises :class:`InputError` when nothing is left.
    """
    if samples < 1:
        raise InputError(f"samples {samples} must be at least 1")
    limit, notes = samples, []
    while True:
        if isinstance(data, (str, Path)):
            examples = load_examples(Path(data), text_field=text_field, limit=limit)
        else:
            examples = tuple(_example(value, text_field) for value in data[:limit])
        join = pack and all(example.answer is None for example in examples)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            encoded = encode(examples, tokenizer, max_length=max_length, pack=join)
        if task in ANSWERED:
            encoded = tuple(e for e in encoded if e.answer is not None)
        if len(encoded) >= samples or len(examples) < limit:
            break
        limit *= 2
    if not encoded:
        raise InputError(
            f"task {task} needs records with question and answer that fit into {max_length} tokens; found none"
        )
    notes += [str(w.message) for w in caught]
    return encoded[:samples], tuple(notes)


def _example(value: str | Mapping[str, str], text_field: str | None) -> Example:
    return Example(text=value) if isinstance(value, str) else example_from_record(value, "data", text_field)
