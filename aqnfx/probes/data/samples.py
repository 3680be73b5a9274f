"""From a data file or Python values to the encoded samples that a run measures on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from aqnfx.data import EMBEDDED
from aqnfx.errors import InputError, ModelError
from aqnfx.probes.data.batches import DataWarning, Encoded, Example, encode
from aqnfx.probes.data.examples import Data, read_examples
from aqnfx.probes.tasks import TASKS


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
    data: Data,
    tokenizer: Any,
    *,
    samples: int,
    max_length: int,
    task: str = "kl",
    text_field: str | None = None,
    pack: bool = True,
) -> tuple[tuple[Encoded, ...], tuple[str, ...]]:
    """Return up to ``samples`` encoded samples of at most ``max_length`` tokens, and notes on what was left out.

    ``data`` is a file (JSON lines, CSV, parquet or text, see :func:`~aqnfx.probes.data.batches.load_examples`), or texts and
    records with ``question`` / ``answer`` or ``text`` in anything that can be read one after the other: a list, a
    generator, a ``datasets.Dataset``, a table of pandas, polars or pyarrow. Plain texts are joined and cut into samples of
    ``max_length`` tokens unless ``pack`` is off; blank ones are left out. For the tasks ``exact_match`` and ``generate``
    samples without a whole answer are left out. Raises :class:`InputError` when nothing is left.
    """
    if samples < 1:
        raise InputError(f"samples {samples} must be at least 1")
    rows = _Visible(read_examples(data, text_field))
    examples: list[Example] = []
    limit = samples
    while True:
        examples += islice(rows, min(limit - len(examples), sys.maxsize))
        if not examples:
            raise InputError(f"{_named(data)} holds no usable example: {rows.nothing}")
        join = pack and all(example.answer is None for example in examples)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            encoded = encode(examples, tokenizer, max_length=max_length, pack=join, limit=samples)
        if TASKS[task].answers:
            encoded = tuple(e for e in encoded if e.answer is not None)
        if len(encoded) >= samples or len(examples) < limit:
            break
        limit *= 2
    if not encoded:
        raise InputError(
            f"task {task} needs records with question and answer that fit into {max_length} tokens; found none"
        )
    blank = (f"{rows.blank} of {rows.read} examples hold no visible character and were left out",) if rows.blank else ()
    return encoded[:samples], (*blank, *(str(w.message) for w in caught))


class _Visible:
    """The examples with a visible character; counts how many were ``read``, and how many were ``blank``."""

    def __init__(self, examples: Iterator[Example]) -> None:
        self.examples, self.read, self.blank = examples, 0, 0

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        while True:
            example = next(self.examples)
            self.read += 1
            if example.text.strip():
                return example
            self.blank += 1

    @property
    def nothing(self) -> str:
        """Why there is none."""
        if self.read:
            return "every one is blank"
        return "there is none (an iterator can be read only once)"


def _named(data: Data) -> str:
    return str(data) + ":" if isinstance(data, (str, Path)) else "data"
