"""Options: what to diagnose and how, checked before anything slow starts."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from aqnfx.errors import InputError, nearest
from aqnfx.graph.loading import SPREAD
from aqnfx.graph.selector import Selector
from aqnfx.numerics.formats import parse_format
from aqnfx.numerics.noise import NoiseKind
from aqnfx.numerics.perturbations import Perturbation, perturbation
from aqnfx.probes.measurements import ProbeKind
from aqnfx.probes.probe_sets import PROBE_KINDS
from aqnfx.probes.tasks import TASKS
from aqnfx.probes.traces import METRICS

DEFAULT_MAX_LENGTH = 256
DEFAULT_WINDOW = 3
EXECUTORS = ("process", "devices", "ray")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("predict", "measure", "both")
MOST = {
    "samples": 10**7, "eval_samples": 10**7, "seeds": 10**4, "batch_size": 10**6, "window": 10**5, "step": 10**5,
    "max_length": 10**7, "draws": 10**4, "workers": 10**4, "max_new_tokens": 10**6, "pareto": 1000,
}  # fmt: skip
"""Largest counts that can be meant: beyond them a run would not end in a lifetime, or no machine could hold it."""
MOST_SEED = 2**62
MOST_BYTES = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to diagnose and how; the command line's flags of the same names.

    ``ops`` and ``layers`` are selector values (``core``, ``linear|softmax``; ``0-4|7``) or sequences of them; ``seeds``
    is a count (default 3), the seeds are ``seed``, ``seed`` + 1, …; ``levels`` default to 0.01, 0.05 and 0.1,
    ``base_level`` to the middle level, ``window`` to 3 or the number of layers if that is less, ``max_length`` to 256
    tokens or what the model takes if that is less. ``device`` ("auto": layer by layer over all accelerators of this
    machine) and ``dtype`` ("float32", "bfloat16", "float16") are where and in what a model that is loaded here runs.
    ``compile`` is "yes" (Inductor for every distinct block), "no" (PyTorch operations one by one), or "auto" (compile
    what pays for the projected work); ``replay_memory`` bounds what is kept of a batch's clean run, in bytes or as
    "512MiB", and ``replay_offload`` keeps
    it in the host's memory. ``method`` is "measure" (every probe is run with noise), "predict" (one-pass prediction
    with ``draws`` projections, and a few probes measured to check it), or "both" (prediction, then measurement of the
    top probes, a random sample of the others, and the windows around critical layers); ``checkpoint`` keeps only block
    boundaries for its backward passes. ``metric`` adds a classical metric per weight: "fisher-trace" or
    "hessian-trace". Channels whose mean magnitude is ``outlier_threshold`` times the median channel's are reported as
    outliers. ``adaptive`` stops sampling a probe once its class and its place in the ranking are settled; ``budget``
    ("90s", "10m", "2h") is the time for measuring and implies ``adaptive``. ``executor`` is where the measuring is
    done: "process", "devices" (a copy of the model on every accelerator of this machine), "ray" or "ray://HOST:PORT"
    (``workers`` of a Ray cluster, default all). ``perturb`` names a number format, whose error takes the place of noise:
    levels are factors on it (default 1) and there is one seed. ``roles`` says what is perturbed, as a selector value:
    outputs of operations (the default with noise), inputs, weights, keys, values, or "auto" (the default with a format):
    the operands of products and the outputs of all else. ``probes`` are kinds of :data:`aqnfx.probes.probe_sets.PROBE_KINDS`. The
    task "generate" lets the model answer by itself, with its KV cache: at most ``max_new_tokens`` (default: a quarter more than
    the longest answer), until one of the texts ``stop`` (default: a new line with "Q:"). ``allow_missing``: names or globs of
    tensors in which the checkpoint of a model that is loaded here may differ from the model. Raises
    :class:`InputError` and :class:`SelectorError` for values that cannot be meant.
    """

    levels: tuple[float, ...] = cast(Any, None)  # None only until the options are checked
    base_level: float | None = None
    window: int | None = None
    step: int = 1
    samples: int = 100
    seeds: int = cast(Any, None)
    seed: int = 0
    ops: str = "extended"
    layers: str | None = None
    task: str | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    noise: str = NoiseKind.RELATIVE_GAUSSIAN
    perturb: str | None = None
    roles: str | None = None
    probes: tuple[ProbeKind, ...] = ("operator", "layer", "window", "all")
    method: str = "both"
    draws: int = 8
    checkpoint: bool = False
    metric: str | None = None
    outlier_threshold: float = 10.0
    compile: str = "auto"
    replay_memory: str | int = "2GiB"
    replay_offload: bool = False
    batch_size: int = 32
    max_length: int | None = None
    text_field: str | None = None
    pack: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    adaptive: bool = False
    budget: str | float | None = None
    executor: str = "process"
    workers: int | None = None
    allow_missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("noise", str(self.noise), [str(kind) for kind in NoiseKind])
        if self.perturb is not None:
            self._set("perturb", parse_format(str(self.perturb)).name)
            if self.noise != NoiseKind.RELATIVE_GAUSSIAN:
                raise InputError(f"noise {self.noise} and perturb {self.perturb} were both asked; a run has one of them")
            if self.seeds not in (None, 1):
                raise InputError(f"seeds {self.seeds} was asked; a format is not random, so there is nothing to repeat")
        if self.levels is None:
            self._set("levels", self.perturbation.levels)
        if self.seeds is None:
            self._set("seeds", self.perturbation.seeds)
        for name in ("samples", "seeds", "batch_size", "window", "step", "max_length", "draws", "workers", "max_new_tokens"):
            value = getattr(self, name)
            if value is None and name in ("window", "max_length", "workers", "max_new_tokens"):
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise InputError(f"{name} must be a whole number, found {value!r}")
            if value < 1:
                raise InputError(f"{name} {shown(value)} must be at least 1")
            check_most(name, int(value))
        check_seed(self.seed)
        _one_of("compile", self.compile, ("auto", "yes", "no"))
        if self.executor not in EXECUTORS and not str(self.executor).startswith("ray://"):
            raise InputError(f"executor {self.executor!r} is not one of {', '.join(EXECUTORS)}, ray://HOST:PORT")
        if self.device == SPREAD and self.executor != "process":
            raise InputError(
                f"device auto spreads one copy of the model over all accelerators, executor {self.executor} makes one copy "
                "for every worker; use one of them"
            )
        if self.workers is not None and self.executor == "process":
            raise InputError(f"workers {self.workers} needs executor devices or ray; this process is one worker")
        byte_count("replay_memory", self.replay_memory)
        if self.budget is not None:
            duration("budget", self.budget)
        for name in ("adaptive", "checkpoint", "pack", "replay_offload"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, found {getattr(self, name)!r}")
        _one_of("method", self.method, METHODS)
        _one_of("dtype", self.dtype, DTYPES)
        if self.task is not None:
            _one_of("task", self.task, TASKS)
        self._check_generation()
        if not isinstance(self.outlier_threshold, numbers.Real) or not 1.0 < float(self.outlier_threshold) < float("inf"):
            raise InputError(f"outlier_threshold must be a number above 1, found {self.outlier_threshold!r}; 10 is usual")
        if self.metric is not None:
            _one_of("metric", self.metric, METRICS)
        self._set("levels", _levels(self.levels))
        self._set("probes", _words("probes", self.probes))
        for kind in self.probes:
            _one_of("probes", kind, PROBE_KINDS)
        if not self.probes or len(set(self.probes)) != len(self.probes):
            raise InputError(f"probes must be given and differ, found {', '.join(self.probes) or 'none'}")
        self._set("allow_missing", _words("allow_missing", self.allow_missing))
        self._set("ops", "|".join(_words("ops", self.ops)))
        if self.layers is not None:
            self._set("layers", "|".join(_words("layers", self.layers)))
        if self.base not in self.levels:
            raise InputError(f"base level {self.base} is not among the levels {', '.join(map(str, self.levels))}")
        if self.roles is not None:
            self._set("roles", "|".join(_words("roles", self.roles)))
        Selector.parse(self.where)

    def _check_generation(self) -> None:
        if self.stop is not None:
            self._set("stop", tuple(self.stop) if isinstance(self.stop, (list, tuple)) else (self.stop,))
            if not all(isinstance(text, str) and text for text in self.stop):
                raise InputError(f"stop must be texts that are not empty, found {', '.join(map(repr, self.stop))}")
        if self.task != "generate":
            if given := [name for name in ("max_new_tokens", "stop") if getattr(self, name) is not None]:
                raise InputError(f"{given[0]} is for task generate; ask for that task, or leave it out")
        elif not self.perturbation.generates:
            raise InputError("task generate measures noise; a number format (perturb) is measured by task exact_match or kl")
        elif self.executor != "process":
            raise InputError(f"task generate runs in one process; executor {self.executor} was asked, leave it out")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def base(self) -> float:
        """The level that ``per_operator`` and ``per_layer`` are read at."""
        return self.base_level if self.base_level is not None else sorted(self.levels)[len(self.levels) // 2]

    @property
    def kind(self) -> str:
        """The name of what perturbs: a kind of noise or a number format."""
        return self.perturb or self.noise

    @property
    def perturbation(self) -> Perturbation:
        """What perturbs."""
        return perturbation(str(self.kind))

    @property
    def captured(self) -> str:
        """The declared perturbation that signal-to-noise ratios of activations refer to."""
        return self.perturb or "bf16"

    @property
    def budget_seconds(self) -> float | None:
        """The time for measuring, in seconds, or None for as long as it takes."""
        return None if self.budget is None else duration("budget", self.budget)

    @property
    def replay_bytes(self) -> int:
        """The bound on what is kept of a clean run, in bytes."""
        return byte_count("replay_memory", self.replay_memory)

    @property
    def where(self) -> str:
        """The selector of the probed sites."""
        roles = self.roles or ("auto" if self.perturbation.on_operands else None)
        parts = {"ops": self.ops, "layers": self.layers, "roles": roles}
        return ",".join(f"{field}:{value}" for field, value in parts.items() if value)


def shown(value: Any) -> str:
    """Return a value as a message shows it: a long one by its beginning."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:79] + "…"


def check_most(name: str, value: int) -> None:
    """Raise :class:`InputError` for a count beyond what can be meant."""
    if value > MOST[name]:
        raise InputError(f"{name} {shown(value)} must be at most {MOST[name]:,}")


def check_seed(seed: Any) -> None:
    """Raise :class:`InputError` for what is no seed."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise InputError(f"seed must be a whole number, found {shown(seed)}")
    if not -MOST_SEED <= int(seed) <= MOST_SEED:
        raise InputError(f"seed {shown(seed)} must be between -2^62 and 2^62")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(name: str, value: str | int) -> int:
    """Return a number of bytes given as such or as a text with a unit; raises :class:`InputError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if isinstance(value, bool) or not match or match[2].upper() not in _UNITS:
        raise InputError(f"{name} {value!r} is not a number of bytes; write for example 512MiB or 2GiB")
    found = float(match[1]) * _UNITS[match[2].upper()]
    if found > MOST_BYTES:
        raise InputError(f"{name} {shown(value)} is more than any machine has; write for example 512MiB or 2GiB")
    return int(found)


MOST_SECONDS = 366 * 86400.0
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def duration(name: str, value: str | float) -> float:
    """Return seconds given as a number or as a text with a unit; raises :class:`InputError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip())
    if isinstance(value, bool) or not match or match[2] not in _SECONDS or not float(match[1]) > 0:
        raise InputError(f"{name} {value!r} is not a time; write for example 90s, 10m or 2h")
    found = float(match[1]) * _SECONDS[match[2]]
    if found > MOST_SECONDS:
        raise InputError(f"{name} {shown(value)} is longer than a year; write for example 90s, 10m or 2h")
    return found


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        raise InputError(f"{name} {shown(value)} is not one of {', '.join(known)}{nearest(str(value)[:80], known)}")


def _levels(values: Any) -> tuple[float, ...]:
    values = (values,) if isinstance(values, numbers.Real) else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"levels must be numbers such as (0.01, 0.05, 0.1), found {values!r}")
    levels = []
    for given in values:
        if not isinstance(given, numbers.Real):
            raise InputError(f"levels must be numbers such as (0.01, 0.05, 0.1), found {given!r}")
        if not 0.0 < (value := float(given)) < float("inf"):
            raise InputError(f"noise level {value} must be positive and finite")
        levels.append(value)
    if not levels or len(set(levels)) != len(levels):
        raise InputError(f"levels must be given and differ, found {', '.join(map(str, levels)) or 'none'}")
    return tuple(levels)


def _words(name: str, values: str | int | Sequence[str | int]) -> tuple[str, ...]:
    """Return the parts of ``"a,b"``, ``"a|b"`` or of a sequence of names or numbers."""
    if isinstance(values, str):
        return tuple(part.strip() for part in values.replace("|", ",").split(",") if part.strip())
    values = [values] if isinstance(values, int) else values
    if not isinstance(values, Iterable) or not all(isinstance(v, (str, numbers.Integral)) for v in values):
        raise InputError(f"{name} must be a text or a sequence of names, found {values!r}")
    return tuple(str(v) for v in values)
