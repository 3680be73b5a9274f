"""Options: what to diagnose and how, checked before anything slow starts."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from aqnfx.errors import InputError
from aqnfx.graph.loading import SPREAD
from aqnfx.graph.selector import Selector
from aqnfx.numerics.formats import parse_format
from aqnfx.numerics.noise import NoiseKind
from aqnfx.numerics.perturbations import Perturbation, perturbation
from aqnfx.probes.measurements import ProbeKind
from aqnfx.probes.probe_sets import PROBE_KINDS
from aqnfx.probes.settings import RunSettings, byte_count, check_count, check_seed, duration, name_list, one_of
from aqnfx.probes.tasks import TASKS
from aqnfx.probes.traces import METRICS

DEFAULT_WINDOW = 3
EXECUTORS = ("process", "devices", "ray")
METHODS = ("predict", "measure", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(RunSettings):
    """What to diagnose and how, beside the settings of every run; the command line's flags of the same names.

    ``ops`` and ``layers`` are selector values (``core``, ``linear|softmax``; ``0-4|7``) or sequences of them; ``seeds``
    is a count (default 3), the seeds are ``seed``, ``seed`` + 1, …; ``levels`` default to 0.01, 0.05 and 0.1,
    ``base_level`` to the middle level, ``window`` to 3 or the number of layers if that is less. ``compile`` is "yes"
    (Inductor for every distinct block), "no" (PyTorch operations one by one), or "auto" (compile what pays for the projected
    work); ``replay_memory`` bounds what is kept of a batch's clean run, in bytes or as "512MiB", and ``replay_offload`` keeps
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
    the operands of products and the outputs of all else. ``probes`` are kinds of
    :data:`aqnfx.probes.probe_sets.PROBE_KINDS`. The task "generate" lets the model answer by itself, with its KV cache: at
    most ``max_new_tokens`` (default: a quarter more than the longest answer), until one of the texts ``stop`` (default: a new
    line with "Q:"). Raises :class:`InputError` and :class:`SelectorError` for values that cannot be meant.
    """

    levels: tuple[float, ...] = cast(Any, None)  # None only until the options are checked
    base_level: float | None = None
    window: int | None = None
    step: int = 1
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
    adaptive: bool = False
    budget: str | float | None = None
    executor: str = "process"
    workers: int | None = None

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        check_seed(self.seed)
        one_of("noise", str(self.noise), [str(kind) for kind in NoiseKind])
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
        for name in ("seeds", "window", "step", "draws", "workers", "max_new_tokens"):
            if (value := getattr(self, name)) is not None or name in ("seeds", "step", "draws"):
                check_count(name, value)
        one_of("compile", self.compile, ("auto", "yes", "no"))
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
        for name in ("adaptive", "checkpoint", "replay_offload"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, found {getattr(self, name)!r}")
        one_of("method", self.method, METHODS)
        if self.task is not None:
            one_of("task", self.task, TASKS)
        self._check_generation()
        if not isinstance(self.outlier_threshold, numbers.Real) or not 1.0 < float(self.outlier_threshold) < float("inf"):
            raise InputError(f"outlier_threshold must be a number above 1, found {self.outlier_threshold!r}; 10 is usual")
        if self.metric is not None:
            one_of("metric", self.metric, METRICS)
        self._set("levels", _levels(self.levels))
        self._set("probes", name_list("probes", self.probes))
        for kind in self.probes:
            one_of("probes", kind, PROBE_KINDS)
        if not self.probes or len(set(self.probes)) != len(self.probes):
            raise InputError(f"probes must be given and differ, found {', '.join(self.probes) or 'none'}")
        self._set("ops", "|".join(name_list("ops", self.ops)))
        if self.layers is not None:
            self._set("layers", "|".join(name_list("layers", self.layers)))
        if self.base not in self.levels:
            raise InputError(f"base level {self.base} is not among the levels {', '.join(map(str, self.levels))}")
        if self.roles is not None:
            self._set("roles", "|".join(name_list("roles", self.roles)))
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
