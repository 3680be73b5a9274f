"""From examples to batches of token ids: what is scored, what answers what, and one shape for compiled graphs."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from aqnfx.errors import InputError
from aqnfx.probes.data.examples import Example, load_examples
from aqnfx.probes.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "DataWarning", "Encoded", "Example", "by_length", "data_digest", "encode", "load_examples", "make_batches"]


class DataWarning(UserWarning):
    """Some examples cannot be used as they stand; the message counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One sample as token ids.

    Tokens at positions [``score_from``, len) are predicted and scored; ``score_from`` >= 1. ``answer``: positions
    [start, end) of the answer's tokens, None where there is none or it was cut off. ``truncated``: tokens beyond
    ``max_length`` were cut off. ``number``: its place in the data where samples stand in another order, for messages.
    """

    input_ids: tuple[int, ...]
    score_from: int
    answer: tuple[int, int] | None = None
    truncated: bool = False
    number: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.score_from < len(self.input_ids):
            raise ValueError(f"score_from={self.score_from} leaves nothing to score of {len(self.input_ids)} tokens")
        if self.answer is not None and not self.score_from <= self.answer[0] < self.answer[1] <= len(self.input_ids):
            raise ValueError(f"answer {self.answer} lies outside the scored tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Right-padded rows; rows at and beyond ``size`` only fill the shape and are never scored.

    ``row_offset``: index of the first row among all samples; ``numbers``: what messages call the rows (default: their
    indices). ``input_ids``, ``attention_mask``: int64 (B, S).
    ``score_mask``, ``answer_mask``: bool (B, S−1), True at t where ``logits[:, t]`` predicts a scored token, or a token
    of the answer, at t + 1. ``answer_mask`` is None where no sample of the whole data set has an answer.
    """

    row_offset: int
    size: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    score_mask: torch.Tensor
    answer_mask: torch.Tensor | None
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on ``device``; CUDA copies them while the host goes on."""
        if torch.device(device).type == "cuda" and self.input_ids.device.type == "cpu":
            return self._moved(lambda t: t.pin_memory().to(device, non_blocking=True))
        return self._moved(lambda t: t.to(device))

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=move(self.attention_mask),
            score_mask=move(self.score_mask),
            answer_mask=None if self.answer_mask is None else move(self.answer_mask),
        )

    def number(self, row: int) -> int:
        """Return what messages call a row: the place of its sample in the data."""
        return self.numbers[row] if self.numbers else self.row_offset + row


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int, pack: bool = False,
    limit: int | None = None,
) -> tuple[Encoded, ...]:  # fmt: skip
    """Return the examples as token ids, each cut to ``max_length`` tokens; ``limit``: how many of packed ones are wanted.

    Of an example with an answer the answer's tokens are scored, of a text all tokens but the first. ``pack`` joins the
    texts and cuts them into samples of ``max_length`` tokens, so that short texts cost no padding and long ones lose
    nothing (but for a last single token). Examples without a scored token left are dropped, and answers that were cut
    off count for no exact match: a DataWarning gives both numbers. Cut samples have ``truncated`` set. Special tokens that
    the tokenizer adds are not added to a text that carries them. Of a very long text only the beginning is tokenised.

    Raises InputError where ``max_length`` < 2, there are no examples, none is left, or ``pack`` meets an answer.
    """
    if max_length < 2:
        raise InputError(f"max_length must be at least 2 (a token to predict from, one to score), found {max_length}")
    if not examples:
        raise InputError("no examples to encode")
    rows: Iterator[tuple[tuple[int, ...], int, int | None]]
    tokens = Tokens(tokenizer)
    if pack and all(example.answer is None for example in examples):
        most = None if limit is None else limit * max_length
        stream = tokens.joined([example.text for example in examples], most)
        starts = range(0, len(stream) - 1, max_length)[:limit]
        rows = ((tuple(stream[i : i + max_length]), 1, None) for i in starts)
    elif pack:
        raise InputError("pack: examples with answers cannot be packed; leave pack off")
    else:
        rows = tokens.rows(examples, max_length)
    encoded: list[Encoded] = []
    dropped = cut_answers = 0
    for ids, start, end in rows:
        kept = ids[:max_length]
        if start >= len(kept):
            dropped += 1
            continue
        whole = end is not None and start < end <= len(kept)
        cut_answers += end is not None and not whole
        answer = (start, end) if end is not None and whole else None
        encoded.append(Encoded(input_ids=kept, score_from=start, answer=answer, truncated=len(kept) < len(ids)))
    if not encoded:
        raise InputError(f"none of the {len(examples)} examples has a token to score within max_length={max_length}")
    if dropped or cut_answers:
        warnings.warn(
            f"{dropped} of {dropped + len(encoded)} samples have no token to score within max_length={max_length} and "
            f"were dropped; {cut_answers} more had their answer cut off and count for no exact match",
            DataWarning,
            stacklevel=2,
        )
    return tuple(encoded)


def by_length(encoded: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """Return the samples in order of their length, so that those of a batch need little padding; they keep their numbers."""
    numbered = [dataclasses.replace(row, number=i if row.number is None else row.number) for i, row in enumerate(encoded)]
    return tuple(sorted(numbered, key=lambda row: len(row.input_ids)))


def make_batches(
    encoded: Sequence[Encoded], *, batch_size: int, pad_id: int, fixed_length: int | None = None
) -> Iterator[Batch]:
    """Yield the samples in order as batches of ``batch_size`` rows, right-padded with ``pad_id``.

    Without ``fixed_length`` a batch is as long as its longest row and the last may have fewer rows. With it every batch
    has the shape (batch_size, fixed_length), the last filled up with copies of its first row, so that a compiled graph
    sees one shape. Raises InputError for no samples, a size below 1, or a row longer than ``fixed_length``.
    """
    if not encoded or batch_size < 1:
        raise InputError(f"batches need samples and a batch size of at least 1, found {len(encoded)} and {batch_size}")
    longest = max(len(row.input_ids) for row in encoded)
    if fixed_length is not None and longest > fixed_length:
        raise InputError(f"a sample has {longest} tokens, more than fixed_length={fixed_length}; lower max_length")
    answers = any(row.answer is not None for row in encoded)
    return (
        _batch(encoded[offset : offset + batch_size], offset, batch_size, pad_id, fixed_length, answers)
        for offset in range(0, len(encoded), batch_size)
    )


def data_digest(encoded: Sequence[Encoded]) -> str:
    """Return the SHA-256 (hexadecimal) of token ids, scored ranges and answers, in order; equal data, equal digest."""
    digest = hashlib.sha256(b"aqnfx.data/1")
    for row in encoded:
        start, end = row.answer or (-1, -1)
        header = [len(row.input_ids), row.score_from, start, end]
        digest.update(np.asarray([*header, *row.input_ids], dtype="<i8").tobytes())
    return digest.hexdigest()


def _batch(
    rows: Sequence[Encoded], offset: int, batch_size: int, pad_id: int, fixed_length: int | None, answers: bool
) -> Batch:
    height = batch_size if fixed_length is not None else len(rows)
    width = fixed_length if fixed_length is not None else max(len(row.input_ids) for row in rows)
    input_ids = torch.full((height, width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((height, width), dtype=torch.int64)
    score_mask = torch.zeros((height, width - 1), dtype=torch.bool)
    answer_mask = torch.zeros((height, width - 1), dtype=torch.bool) if answers else None
    for i, row in enumerate([*rows, *[rows[0]] * (height - len(rows))]):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids, dtype=torch.int64)
        attention_mask[i, :length] = 1
        if i >= len(rows):
            continue
        score_mask[i, row.score_from - 1 : length - 1] = True
        if answer_mask is not None and row.answer is not None:
            answer_mask[i, row.answer[0] - 1 : row.answer[1] - 1] = True
    return Batch(
        row_offset=offset, size=len(rows), input_ids=input_ids, attention_mask=attention_mask, score_mask=score_mask,
        answer_mask=answer_mask,
        numbers=tuple(offset + i if row.number is None else row.number for i, row in enumerate(rows)),
    )  # fmt: skip
