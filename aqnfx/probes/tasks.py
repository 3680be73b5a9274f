"""From logits to per-sample scores: every metric from one look at the logits.

KL, likelihood and agreement of a perturbed run are computed relative to the clean one. With p the clean distribution,
d = z' − z the change of the logits and m = Σ p·d,

    KL(p ‖ p') = log Σ p·e^d − Σ p·d = log(1 + Σ p·(e^x − 1 − x)),   x = d − m,

and log Z' = log Z + m + KL. Only differences of logits enter, so a KL of 1e-9 keeps its digits where the difference of
two float32 log-softmaxes is rounding noise of about 1e-7; every term is >= 0; equal logits give exactly 0; and there is
one exponential per vocabulary entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from aqnfx.errors import InputError, ProbeError, nearest
from aqnfx.probes.data.batches import Batch

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How a per-sample score becomes a number: its sum over samples divided by the sum of a denominator.

    ``name``: its key in :data:`Scores`, the numerator. ``denominator``: the scored positions (``tokens``), or the samples
    that have an answer. ``clean``: what the run without noise scores by definition, 0 or every position, or ``measured``
    where that has to be kept; a measured one per token is reported as its change. ``better``: the direction. ``reported``,
    ``interval``, ``change``, ``baseline``: its keys in records of maps and plans. ``degradation``: what the share
    that is lost of it is called. ``answers``: only data with answers has it. ``next_token``: only causal models have it.
    """

    name: str
    denominator: Literal["tokens", "answers"] = "tokens"
    clean: Literal["zero", "tokens", "measured"]
    better: Literal["lower", "higher"]
    reported: str
    interval: str = ""
    change: str = ""
    baseline: str = ""
    degradation: str = ""
    next_token: bool = False

    @property
    def answers(self) -> bool:
        """Whether only data with answers has it."""
        return self.denominator == "answers"

    def of_clean(self, clean: Mapping[str, Any], tokens: Any) -> NDArray[np.float64]:
        """Return the per-sample scores (n,) of the run without noise, whose measured ones are ``clean``."""
        scored = np.asarray(tokens, dtype=np.float64)
        if self.clean == "measured":
            return np.asarray(clean[self.name], dtype=np.float64)
        return scored if self.clean == "tokens" else np.zeros_like(scored)

    def lost(self, clean: Any, scores: Any) -> NDArray[np.float64]:
        """Return by how much ``scores`` are worse than ``clean``; negative where they are better."""
        return np.asarray(clean - scores if self.better == "higher" else scores - clean, dtype=np.float64)

    def after(self, clean: Any, lost: Any) -> NDArray[np.float64]:
        """Return the scores that are worse than ``clean`` by ``lost``."""
        return np.asarray(clean - lost if self.better == "higher" else clean + lost, dtype=np.float64)


KL = Metric(name="kl", clean="zero", better="lower", reported="kl", interval="ci")
NLL = Metric(
    name="nll", clean="measured", better="lower", reported="nll_delta", interval="nll_delta_ci", change="nll_increase",
    baseline="nll", next_token=True,
)  # fmt: skip
TOP1 = Metric(
    name="top1", clean="tokens", better="higher", reported="top1_agreement", interval="top1_ci", degradation="1 - top1"
)
EXACT_MATCH = Metric(
    name="exact_match", denominator="answers", clean="measured", better="higher", reported="exact_match",
    change="exact_match_change", baseline="accuracy", degradation="exact_match",
)  # fmt: skip
METRICS = {metric.name: metric for metric in (KL, NLL, TOP1, EXACT_MATCH)}
"""Every score that :func:`score` gives, by its key, in the order of records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a run is asked for: degradation is the share of ``metric`` that is lost, where the clean model has any.

    ``next_token``: needs a causal model.
    """

    metric: Metric
    next_token: bool = False

    @property
    def answers(self) -> bool:
        """Whether the data must have answers."""
        return self.metric.answers


TASKS = {
    "kl": Task(metric=TOP1),
    "nll": Task(metric=TOP1, next_token=True),
    "top1_agreement": Task(metric=TOP1),
    "exact_match": Task(metric=EXACT_MATCH, next_token=True),  # given the tokens before: teacher forcing
    "generate": Task(metric=EXACT_MATCH, next_token=True),
}


def degradation_of(task: str, clean: Mapping[str, Any]) -> Metric:
    """Return the metric whose loss is the degradation: that of ``task`` where the clean scores add up to some, else top-1."""
    metric = TASKS[task].metric
    if metric.clean == "measured" and not (metric.name in clean and float(np.nansum(clean[metric.name])) > 0):
        return TOP1
    return metric

_CHUNK_CPU = 1 << 20  # vocabulary entries at a time: stays in the caches
_CHUNK_GPU = 1 << 26  # few launches, 256 MiB per temporary
_LARGEST_RISE = 60.0  # e^x beyond this is computed in float64 with the textbook formula


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The clean run of one batch at its m scored positions, what perturbed runs of that batch are scored against.

    ``rows``, ``columns``: int64 (m,), where they stand in the logits. ``logits``: (m, V) as the model gave them.
    ``probabilities``: (m, V) float32 (float64 for float64 logits). ``log_norm``, ``label_logit``: float64 (m,).
    ``labels``, ``top``: int64 (m,), the token that follows and the clean argmax. ``answer``: bool (m,) or None.
    """

    size: int
    numbers: tuple[int, ...]
    shape: tuple[int, ...]
    rows: torch.Tensor
    columns: torch.Tensor
    logits: torch.Tensor
    probabilities: torch.Tensor
    log_norm: torch.Tensor
    label_logit: torch.Tensor
    labels: torch.Tensor
    top: torch.Tensor
    answer: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """The bytes of the logits and probabilities, beside which the rest is little."""
        return self.logits.nbytes + self.probabilities.nbytes


def accuracy_like(task: str, has_answers: bool) -> str:
    """Return the score that relative degradation is read from: ``exact_match`` for tasks with answers, else ``top1``.

    For ``top1`` the clean value is the number of scored tokens, so degradation is 1 − top-1 agreement. Raises
    InputError for an unknown task, or one with answers on data without.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}{nearest(task, TASKS)}")
    if TASKS[task].answers and not has_answers:
        raise InputError(f"task {task} needs examples with 'question' and 'answer'; for plain text use kl")
    return TASKS[task].metric.name


@torch.no_grad()
def reference(batch: Batch, logits: torch.Tensor) -> tuple[Reference, Scores]:
    """Return the clean reference of a batch and its own scores, from logits (B, S, V) of any float dtype.

    Scores are float64 (size,): those of :func:`score` with kl 0 and every position agreeing. Raises ProbeError where
    logits are not finite at a scored position, or do not have the shape of the batch.
    """
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(batch.input_ids.shape):
        raise ProbeError(
            f"the model returned logits of shape {tuple(logits.shape)}, and the batch needs "
            f"({', '.join(str(s) for s in batch.input_ids.shape)}, vocabulary)"
        )
    mask = batch.score_mask[: batch.size].to(logits.device)
    rows, columns = mask.nonzero(as_tuple=True)
    labels = batch.input_ids.to(logits.device)[rows, columns + 1]
    if rows.numel() == 0:
        raise ProbeError("the batch has no scored position; make batches with make_batches")
    clean = logits[rows, columns]
    numbers = tuple(batch.number(row) for row in range(batch.size))
    # A NaN or infinity anywhere in a row makes its sum NaN or infinite; only then is a closer look needed.
    if not bool(clean.sum(dtype=torch.float64).isfinite()):
        _require_finite(clean, rows, numbers)
    probabilities = torch.empty(clean.shape, dtype=_work_dtype(clean), device=clean.device)
    norms: list[torch.Tensor] = []
    for part in _chunks(clean):
        wide = clean[part].to(probabilities.dtype)
        top = wide.amax(dim=-1, keepdim=True)
        exponentials = torch.sub(wide, top, out=probabilities[part]).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        exponentials.div_(total)
        norms.append((top.double() + total.double().log()).squeeze(-1))
    answer = None if batch.answer_mask is None else batch.answer_mask.to(logits.device)[rows, columns]
    made = Reference(
        size=batch.size,
        numbers=numbers,
        shape=tuple(logits.shape),
        rows=rows,
        columns=columns,
        logits=clean,
        probabilities=probabilities,
        log_norm=torch.cat(norms),
        label_logit=clean.gather(-1, labels[:, None]).squeeze(-1).double(),
        labels=labels,
        top=clean.argmax(dim=-1),
        answer=answer,
    )
    nll = made.log_norm - made.label_logit
    return made, _per_sample(made, torch.zeros_like(nll), nll, made.top)


@torch.no_grad()
def score(reference: Reference, logits: torch.Tensor) -> Scores:
    """Return per-sample scores of a perturbed run of the same batch, from its logits (B, S, V).

    Each is float64 (size,): ``kl`` the sum over the sample's scored positions of KL(clean ‖ perturbed), ``nll`` that of
    the negative log-likelihood of the tokens, both in nats; ``top1`` the number of positions whose argmax equals the
    clean one; ``exact_match`` 1 where every token of the answer is the argmax given the tokens before it (teacher
    forcing), else 0, nan for a sample without an answer; the key is present where the data set has answers. Raises
    ProbeError where logits are not finite at a scored position, or have another shape than the clean ones.
    """
    if tuple(logits.shape) != reference.shape:
        raise ProbeError(f"perturbed logits have shape {tuple(logits.shape)}, and the clean ones {reference.shape}")
    kls: list[torch.Tensor] = []
    nlls: list[torch.Tensor] = []
    tops: list[torch.Tensor] = []
    for part in _chunks(reference.logits):
        noisy = logits[reference.rows[part], reference.columns[part]]
        kl, nll = _divergence(reference, part, noisy)
        kls.append(kl)
        nlls.append(nll)
        tops.append(noisy.argmax(dim=-1))
    return _per_sample(reference, torch.cat(kls), torch.cat(nlls), torch.cat(tops))


def _divergence(reference: Reference, part: slice, noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL and negative log-likelihood (float64) at the positions ``part``, with perturbed logits ``noisy``."""
    probabilities, clean = reference.probabilities[part], reference.logits[part]
    labels = reference.labels[part][:, None]
    change = noisy.to(probabilities.dtype) - clean.to(probabilities.dtype)
    mean = torch.mul(probabilities, change).sum(dim=-1, keepdim=True)
    change.sub_(mean)
    largest = change.amax(dim=-1)
    excess = torch.expm1(change).sub_(change).mul_(probabilities).sum(dim=-1)
    kl = excess.double().log1p()
    label_logit = noisy.gather(-1, labels).squeeze(-1).double()
    nll = reference.log_norm[part] + mean.squeeze(-1).double() + kl - label_logit
    wild = (~(largest <= _LARGEST_RISE)).nonzero().squeeze(-1)  # nan compares as wild, too
    if wild.numel():
        far = noisy[wild]
        _require_finite(far, reference.rows[part][wild], reference.numbers)
        p, q = (torch.log_softmax(z.double(), dim=-1) for z in (clean[wild], far))
        kl[wild] = (p.exp() * (p - q)).sum(dim=-1).clamp_min(0.0)
        nll[wild] = -q.gather(-1, labels[wild]).squeeze(-1)
    return kl, nll


def _per_sample(reference: Reference, kl: torch.Tensor, nll: torch.Tensor, top: torch.Tensor) -> Scores:
    """Add up per-position values by sample, in float64 and on the CPU, where the order of addition is fixed."""
    rows = reference.rows.cpu()

    def total(values: torch.Tensor) -> NDArray[np.float64]:
        sums = torch.zeros(reference.size, dtype=torch.float64).index_add_(0, rows, values.double().cpu())
        result: NDArray[np.float64] = sums.numpy()
        return result

    scores = {KL.name: total(kl), NLL.name: total(nll), TOP1.name: total(top == reference.top)}
    if reference.answer is not None:
        tokens, wrong = total(reference.answer), total(reference.answer & (top != reference.labels))
        scores[EXACT_MATCH.name] = np.where(tokens > 0, (wrong == 0).astype(np.float64), np.nan)
    return scores


def _chunks(values: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the m positions of (m, V) that bound the memory of temporaries."""
    limit = _CHUNK_CPU if values.device.type == "cpu" else _CHUNK_GPU
    step = max(1, limit // max(1, values.shape[-1]))
    return (slice(start, start + step) for start in range(0, values.shape[0], step))


def _work_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _require_finite(logits: torch.Tensor, rows: torch.Tensor, numbers: Sequence[int]) -> None:
    bad = rows[~torch.isfinite(logits).all(dim=-1)]
    if bad.numel():
        samples = sorted({numbers[int(row)] for row in bad})
        names = ", ".join(str(sample) for sample in samples[:5]) + (", …" if len(samples) > 5 else "")
        raise ProbeError(
            f"logits are not finite at {bad.numel()} scored positions of sample {names}; "
            "lower the noise level, or run the model in float32"
        )
