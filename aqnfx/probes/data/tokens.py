"""From texts to token ids: special tokens once, the beginning of long texts only, and where an answer stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aqnfx.probes.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = 1 << 17  # characters up to which a text is always tokenised as a whole
_CHARACTERS_PER_TOKEN = 8  # a first guess of how much of a longer text is needed
_TEXTS = 64  # how many texts are tokenised at a time


@dataclass(frozen=True, slots=True)
class Tokens:
    """Calls of one tokenizer; ``before`` and ``after`` are the special tokens that it adds around every text."""

    tokenizer: PreTrainedTokenizerBase
    before: tuple[int, ...] = field(init=False)
    after: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        before, after = _added(self.tokenizer)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)

    def joined(self, texts: Sequence[str], most: int | None = None) -> list[int]:
        """Return the ids of the texts one after the other; with ``most`` at least that many where they have them."""
        stream: list[int] = []
        for first in range(0, len(texts), _TEXTS):
            needed = None if most is None else most - len(stream)
            if needed is not None and needed <= 0:
                break
            for ids in self._ids(texts[first : first + _TEXTS], needed):
                stream += ids
        return stream

    def rows(self, examples: Sequence[Example], most: int) -> Iterator[tuple[tuple[int, ...], int, int | None]]:
        """Yield (ids, first scored position, end of the answer or None) of each example, not cut unless very long.

        More than ``most`` ids are there where the whole text has more.
        """
        texts = iter(self._ids([example.text for example in examples if example.prompt is None], most))
        answered = iter(self._ids([example.text for example in examples if example.prompt is not None]))
        prompts = iter(self._ids([example.prompt for example in examples if example.prompt is not None]))
        for example in examples:
            if example.prompt is None:
                yield tuple(next(texts)), 1, None
                continue
            ids, prompt = next(answered), next(prompts)
            if len(prompt) < len(ids) and ids[: len(prompt)] == prompt:
                start, end = len(prompt), len(ids)
            else:
                start, end = self._answer_range(example.text, len(example.prompt), ids, prompt)
            # A prompt without a token (an empty one, no start token) leaves the first answer token without a prediction.
            yield tuple(ids), max(start, 1), end

    def _answer_range(self, text: str, prompt_chars: int, ids: list[int], prompt: list[int]) -> tuple[int, int]:
        """Return positions [start, end) of the answer where the prompt's tokens are no prefix of the text's.

        That happens where a token spans the border, and counts as answer, or a special token follows the text, and does
        not count. Without character offsets the common prefix is taken.
        """
        if self.tokenizer.is_fast:
            called = _call(self.tokenizer, text, return_offsets_mapping=True)
            offsets: list[tuple[int, int]] = called["offset_mapping"][self._once(called["input_ids"])]
            answer = [i for i, (a, b) in enumerate(offsets) if b > prompt_chars and b > a]
            if answer:
                return answer[0], answer[-1] + 1
        shared = 0
        while shared < min(len(ids), len(prompt)) and ids[shared] == prompt[shared]:
            shared += 1
        end = len(ids)
        special = set(self.tokenizer.all_special_ids)
        while end > shared + 1 and ids[end - 1] in special:
            end -= 1
        return shared, end

    def _ids(self, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """Return the ids of every text; of a long one at least the first ``most``, if those are wanted only."""
        short = [text for text in texts if most is None or len(text) <= _WHOLE]
        called: list[list[int]] = _call(self.tokenizer, short)["input_ids"] if short else []
        whole = iter(called)
        return [
            ids[self._once(ids)]
            for text in texts
            for ids in [next(whole) if most is None or len(text) <= _WHOLE else self._beginning(text, most)]
        ]

    def _beginning(self, text: str, most: int) -> list[int]:
        """Return ids of the beginning of ``text``, more than ``most`` unless the whole has fewer.

        How a text begins to be cut into tokens can depend on all of it, in principle: the first ``most`` are taken once
        twice as much of the text leaves them as they are.
        """
        margin = len(self.before) + len(self.after) + _CHARACTERS_PER_TOKEN
        size = max(_WHOLE // 2, _CHARACTERS_PER_TOKEN * (most + margin))
        before: list[int] = []
        while True:
            ids: list[int] = _call(self.tokenizer, text[:size])["input_ids"]
            settled = len(before) > most + margin and before[: most + margin // 2] == ids[: most + margin // 2]
            if settled or size >= len(text):
                return ids
            before, size = ids, 2 * size

    def _once(self, ids: Sequence[int]) -> slice:
        """Return the part of ``ids`` without special tokens that were added beside the text's own."""
        start, end = 0, len(ids)
        if (n := len(self.before)) and end >= 2 * n + len(self.after) and tuple(ids[n : 2 * n]) == self.before:
            start = n
        if (n := len(self.after)) and end - start >= 2 * n + len(self.before) and tuple(ids[end - 2 * n : end - n]) == self.after:
            end -= n
        return slice(start, end)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that ``tokenizer`` puts before and after a text."""
    for probe in ("a", "0", "the"):
        plain = list(_call(tokenizer, probe, add_special_tokens=False)["input_ids"])
        whole = list(_call(tokenizer, probe)["input_ids"])
        for at in range(len(whole) - len(plain) + 1):
            if plain and whole[at : at + len(plain)] == plain:
                return tuple(whole[:at]), tuple(whole[at + len(plain) :])
    return (), ()


def _call(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: bool) -> Mapping[str, Any]:
    # verbose=False: texts longer than the model are expected here, and are cut afterwards.
    result: Mapping[str, Any] = tokenizer(text, truncation=False, padding=False, verbose=False, **options)
    return result
