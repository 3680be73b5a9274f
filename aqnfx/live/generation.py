"""Accuracy of what a model generates: greedy decoding with its KV cache, several samples per batch, noise where asked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aqnfx.errors import InputError, ProbeError
from aqnfx.graph.inputs import max_positions
from aqnfx.live.instrument import Handle, instrument
from aqnfx.probes.data.batches import Batch, Encoded

MARK = "####"
"""What stands before the final answer in worked solutions, as in GSM8K (Cobbe et al. 2021)."""
STOP = ("\nQ:",)
"""Where generation ends by default: at the next question of the format in which records are put."""


def final_answer(text: str, worked: bool) -> str:
    """Return what of an answer is compared: after the first ``####`` to the end of its line where it is ``worked`` out, else all.

    Without commas in numbers and space around it; the empty text where a worked answer has no mark.
    """
    if worked:
        _, _, text = text.partition(MARK)
        text = text.strip().partition("\n")[0]
    return re.sub(r"(?<=\d),(?=\d)", "", text).strip()


def until(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the tokens before the first of ``ends``."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def most_new_tokens(model: nn.Module | None, samples: Sequence[Encoded], asked: int | None = None) -> int:
    """Return how many tokens an answer may have: ``asked``, or a quarter more than the longest answer of ``samples``.

    Raises :class:`InputError` for no model (a traced program has no cache), for one that does not generate, for a sample
    without an answer or a prompt, and where prompt and answer do not fit into the model's positions.
    """
    if model is None:
        raise InputError("task generate needs the model itself, which runs with its KV cache; a Program was given")
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"task generate needs a model with a method generate; {type(model).__name__} has none")
    answers = [sample.answer for sample in samples if sample.answer is not None and sample.answer[0] > 0]
    if not answers or len(answers) < len(samples):
        raise InputError("task generate needs records with question and answer")
    longest, prompt = max(end - start for start, end in answers), max(start for start, _ in answers)
    new = asked if asked is not None else longest + (longest + 3) // 4
    limit = max_positions(model)
    if limit is not None and prompt + new > limit:
        raise InputError(
            f"a prompt has {prompt} tokens and {new} are to be generated; the model takes {limit}: lower max_new_tokens"
        )
    return new


@dataclass(frozen=True, slots=True)
class _Stops:
    """Says which samples have come to a stop: by their text, because one text is many tokens and the other way round."""

    tokenizer: Any
    stop: tuple[str, ...]
    width: int

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.width :])
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=ids.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generator:
    """Answers the questions of ``samples`` by greedy decoding on a live model, with noise at the sites that are asked.

    Prompts of a batch are padded on the left, so the noise of a sample also depends on the longest prompt beside it. Decoding is
    greedy; what else the model's generation configuration says, a penalty on repetition for one, stays. Generation ends at the
    end of text, at one of the strings ``stop``, or after ``max_new_tokens``.
    """

    handle: Handle
    model: nn.Module
    tokenizer: Any
    samples: tuple[Encoded, ...]
    pad: int
    max_new_tokens: int
    stop: tuple[str, ...] = STOP
    _fired: set[tuple[str, ...]] = field(default_factory=set)

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Any, samples: Sequence[Encoded], *, pad: int, where: str, noise: str,
        max_new_tokens: int | None = None, stop: Sequence[str] = STOP, inner: str = "eager",
    ) -> Generator:  # fmt: skip
        """Instrument ``model`` at the sites ``where``; ``max_new_tokens`` defaults to a quarter more than the longest answer.

        Raises :class:`InputError` where :func:`most_new_tokens` does.
        """
        new = most_new_tokens(model, samples, max_new_tokens)
        # As for the traced program, whose sites these are.
        pipeline = f'decompose-attention{{where="{where}"}},tag-ops,insert-noise{{where="{where}" kind={noise}}}'
        handle = instrument(model, pipeline=pipeline, inner=inner, dynamic=True)
        return cls(
            handle=handle, model=model, tokenizer=tokenizer, samples=tuple(samples), pad=pad, max_new_tokens=new,
            stop=tuple(stop),
        )  # fmt: skip

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text, as the model's generation configuration and the tokenizer say."""
        named = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids = named if isinstance(named, (list, tuple)) else [named]
        return frozenset(int(one) for one in (*ids, self.tokenizer.eos_token_id) if one is not None)

    def record(self) -> dict[str, Any]:
        """Return what answers depend on beside model, data and noise: limits, what runs the model, and its own settings."""
        config = getattr(self.model, "generation_config", None)
        return {
            "max_new_tokens": self.max_new_tokens, "stop": list(self.stop), "inner": str(self.handle.backend.inner),
            "generation_config": {} if config is None else {k: v for k, v in config.to_diff_dict().items() if v is not None},
        }  # fmt: skip

    def correct(self, batch: Batch, sites: Sequence[str] = (), *, level: float = 0.0, seed: int = 0) -> list[float]:
        """Return 1 for every sample of ``batch`` whose generated answer is right, else 0.

        Equal arguments give equal noise, whatever ran before. Raises :class:`ProbeError` where noise was not injected at
        every one of ``sites``.
        """
        self.handle.reset_stats()
        self.handle.set_noise(sites=tuple(sites) or None, level=level, seed=seed, step=0, row_offset=batch.row_offset)
        try:
            texts = self.texts(batch)
        finally:
            self.handle.set_noise(level=0.0, step=0)
        self._check(tuple(sites))
        return [float(text == wanted) for text, wanted in zip(self._finals(batch, texts), self._wanted(batch), strict=True)]

    def texts(self, batch: Batch) -> list[str]:
        """Return what is generated for every sample of ``batch``, up to where it stops."""
        prompts = [sample.input_ids[: sample.answer[0]] for sample in self._of(batch) if sample.answer is not None]
        width = max(map(len, prompts))
        device = batch.input_ids.device
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        from transformers.generation.stopping_criteria import StoppingCriteriaList

        stopping = StoppingCriteriaList([_Stops(self.tokenizer, self.stop, width)] if self.stop else [])
        with torch.no_grad():
            made = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None, pad_token_id=self.pad, stopping_criteria=stopping,
            )  # fmt: skip
        # What follows the end is padding, which need not be a special token.
        ended = [until(row[width:].tolist(), self.ends) for row in made]
        found: list[str] = self.tokenizer.batch_decode(ended, skip_special_tokens=True)
        return [min((text.partition(stop)[0] for stop in self.stop), key=len, default=text) for text in found]

    def _of(self, batch: Batch) -> tuple[Encoded, ...]:
        return self.samples[batch.row_offset : batch.row_offset + batch.size]

    def _references(self, batch: Batch) -> list[str]:
        return [
            self.tokenizer.decode(sample.input_ids[slice(*sample.answer)], skip_special_tokens=True)
            for sample in self._of(batch) if sample.answer is not None
        ]  # fmt: skip

    def _wanted(self, batch: Batch) -> list[str]:
        return [final_answer(text, MARK in text) for text in self._references(batch)]

    def _finals(self, batch: Batch, texts: Sequence[str]) -> list[str]:
        return [
            final_answer(text, MARK in reference)
            for text, reference in zip(texts, self._references(batch), strict=True)
        ]  # fmt: skip

    def _check(self, sites: tuple[str, ...]) -> None:
        if not sites or sites in self._fired:
            return
        counts = self.handle.stats()
        if silent := [site for site in sites if not counts.get(site, {}).get("forward")]:
            raise ProbeError(f"{len(silent)} probed sites were silent while the model generated, first {silent[0]}")
        self._fired.add(sites)
