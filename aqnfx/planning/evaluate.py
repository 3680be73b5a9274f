"""Measuring plans: the model as assignments store it against the clean one, on samples that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import ProbeError
from aqnfx.graph.assignments import Assignment, assigned_sites
from aqnfx.graph.program import Program
from aqnfx.numerics.stats import bootstrap_ratio, paired_difference
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data import Batch
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.tasks import Scores, reference, score

Array = NDArray[np.float64]


def stored(program: Program, assignments: Mapping[str, Assignment]) -> Program:
    """Return the program with every assigned operand in its format; the program itself where nothing is assigned."""
    chosen = assigned_sites(program, assignments)
    passes = [f'insert-fake-quant{{where="sites:{"|".join(sites)}" format={name}}}' for name, sites in chosen.items()]
    return Pipeline.parse(",".join(passes))(program) if passes else program


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """Per-sample scores of one set of assignments and of the clean model, and the scored ``tokens`` (n,)."""

    scores: Scores
    clean: Scores
    tokens: Array

    @property
    def kl(self) -> float:
        """KL(clean ‖ stored) in nats per token."""
        return float(self.scores["kl"].sum() / self.tokens.sum())

    def record(self, *, seed: int = 0) -> dict[str, Any]:
        """Return ``kl``, ``nll_increase``, ``top1_agreement`` and, with answers, ``exact_match``, with 95 % intervals."""
        found = {
            "samples": len(self.tokens), "tokens": int(self.tokens.sum()),
            "kl": bootstrap_ratio(self.scores["kl"], self.tokens, seed=seed).to_record(),
            "nll": float(self.scores["nll"].sum() / self.tokens.sum()),
            "clean_nll": float(self.clean["nll"].sum() / self.tokens.sum()),
            "nll_increase": paired_difference(self.scores["nll"], self.clean["nll"], self.tokens, seed=seed).to_record(),
            "top1_agreement": bootstrap_ratio(self.scores["top1"], self.tokens, seed=seed).to_record(),
        }  # fmt: skip
        if "exact_match" in self.scores:
            have = np.isfinite(self.clean["exact_match"])
            one = np.where(have, 1.0, 0.0)
            after, before = (np.where(have, table["exact_match"], 0.0) for table in (self.scores, self.clean))
            found["exact_match"] = bootstrap_ratio(after, one, seed=seed).to_record()
            found["clean_exact_match"] = bootstrap_ratio(before, one, seed=seed).to_record()
            found["exact_match_change"] = paired_difference(after, before, one, seed=seed).to_record()
        return found


def measure_plans(
    program: Program, batches: Sequence[Batch], plans: Mapping[str, Mapping[str, Assignment]], *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Return the scores of the model as each of ``plans`` stores it, by the plan's name.

    Every batch is run clean once and then by every plan, so that what is kept does not grow with the data. ``progress`` is
    told the runs done and their number. Raises :class:`ProbeError` where logits are not finite.
    """
    forwards = {name: eager_forward(stored(program, assignments)) for name, assignments in plans.items()}
    clean_forward, total = eager_forward(program), len(batches) * (len(plans) + 1)
    clean: list[Scores] = []
    found: dict[str, list[Scores]] = {name: [] for name in plans}
    done = 0
    with torch.no_grad():
        for batch in batches:
            known, scores = reference(batch, clean_forward(batch))
            clean.append(scores)
            done += 1
            for name, forward in forwards.items():
                found[name].append(score(known, forward(batch)))
                done += 1
                if progress is not None:
                    progress(done, total)
    tokens = np.concatenate([_tokens(batch) for batch in batches]) if batches else np.zeros(0)
    return {name: Measured(scores=_joined(parts), clean=_joined(clean), tokens=tokens) for name, parts in found.items()}


def _tokens(batch: Batch) -> Array:
    return batch.score_mask[: batch.size].sum(1).cpu().numpy().astype(np.float64)


def _joined(parts: Sequence[Scores]) -> Scores:
    if not parts:
        raise ProbeError("there are no samples to measure a plan on")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
