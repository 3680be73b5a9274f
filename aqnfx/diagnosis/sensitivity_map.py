"""The sensitivity map: which operators, layers, windows and sites cost what under noise (``aqnfx.sensitivity/1``)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from aqnfx.artifacts import Schema, check_schema, jsonable, validate
from aqnfx.errors import ArtifactError
from aqnfx.numerics.perturbations import Perturbation, perturbation


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Task(_Part):
    metric: str
    samples: int = Field(ge=0)
    tokens: int = Field(ge=0)


class _Noise(_Part):
    kind: str
    levels: list[float] = Field(min_length=1)
    base_level: float = Field(gt=0)
    seeds: list[int]
    unit_error: float = Field(default=1.0, gt=0, strict=True)


class _SiteEntry(_Part):
    id: str
    module: str
    op: str
    layer: int | None
    region: str
    measured: dict[str, dict[str, Any]] = {}
    predicted: dict[str, dict[str, Any]] = {}


class _Window(_Part):
    layers: list[int | str]
    measured: float | None
    predicted: float | None
    amplification: float | None


_Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Values(_Part):
    """Numbers of a probe at one level; a version may have fewer of them."""

    kl: float | None = None
    ci: _Interval = [None, None]
    degradation: float | None = None
    degradation_ci: _Interval | None = [None, None]
    score: float | None = None
    score_ci: _Interval = [None, None]
    class_: str = Field(alias="class", default="undefined")


class _Detail(_Part):
    levels: dict[str, _Values]


class _Row(_Part):
    """A row of a ranking."""

    key: str
    degradation: float | None
    degradation_ci: _Interval
    kl: float | None
    kl_ci: _Interval = [None, None]
    score: float | None
    score_ci: _Interval
    class_: str = Field(alias="class")
    critical: bool
    distinguishable: bool
    tied_with_next: bool

    @model_validator(mode="after")
    def _classified(self) -> _Row:
        if self.score is None and (self.critical or self.class_ != "undefined"):
            raise ValueError(f"class {self.class_!r} without a score")
        return self


class _Statistics(_Part):
    confidence: float = Field(gt=0, lt=1, default=0.95)


class _Threshold(_Part):
    operators: dict[str, float | None] = {}
    layers: dict[str, float | None] = {}


class _Trace(_Part):
    value: float | None
    error: float | None
    mean: float | None
    size: int = Field(ge=1)


class _Provenance(_Part):
    """What is calculated with; everything else is only shown."""

    seconds: float | None = None
    total_seconds: float | None = None
    trace_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_mib: float | None = None
    runs: int | None = None
    shares: dict[str, float] = {}


class _None(BaseModel):
    """Nothing of that kind was asked for."""

    model_config = ConfigDict(extra="forbid")


class _Agreement(_Part):
    probes: int = Field(ge=0)
    median_ratio: float
    within_25_percent: float = Field(ge=0, le=1)
    worst: dict[str, Any]
    second_order_fails: bool
    unsettled: bool = False


class _Channels(_Part):
    channels: int = Field(ge=1)
    top: list[tuple[int, float | None, float | None, float | None]]
    outliers: list[dict[str, Any]] = []


class _Weights(_Part):
    metric: str
    source: str = ""
    values: dict[str, _Trace]


class _Sqnr(_Part):
    format: str
    sites: int = Field(ge=0)
    spearman: float | None
    misled: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityMap:
    """One diagnosis as plain JSON values; every field is the key of the same name in the record.

    What an annotation adds to a type is what records that are read are checked against.

    ``per_operator`` and ``per_layer`` hold the relative degradation (a fraction, 0.15 = 15 %) at ``base_level``,
    ``*_kl`` the KL divergence in nats per token, ``*_detail`` every level with its interval: ``[low, high]`` at
    ``statistics["confidence"]``. ``None`` stands for a number that the run cannot give. ``extra`` keeps keys that this
    version does not know, so that reading and writing an artifact loses nothing.
    """

    model: dict[str, Any]
    task: Annotated[dict[str, Any], _Task]
    noise: Annotated[dict[str, Any], _Noise]
    per_site: Annotated[list[dict[str, Any]], list[_SiteEntry]]
    per_operator: dict[str, float | None]
    per_layer: dict[str, float | None]
    windows: Annotated[list[dict[str, Any]], list[_Window]]
    partial: bool = False
    baseline: dict[str, Any] = field(default_factory=dict)
    statistics: Annotated[dict[str, Any], _Statistics] = field(default_factory=dict)
    per_operator_kl: dict[str, float | None] = field(default_factory=dict)
    per_layer_kl: dict[str, float | None] = field(default_factory=dict)
    per_operator_detail: Annotated[dict[str, Any], dict[str, _Detail]] = field(default_factory=dict)
    per_layer_detail: Annotated[dict[str, Any], dict[str, _Detail]] = field(default_factory=dict)
    all_sites: dict[str, Any] = field(default_factory=dict)
    ranking: Annotated[dict[str, list[dict[str, Any]]], dict[str, list[_Row]]] = field(default_factory=dict)
    channels: Annotated[dict[str, Any], dict[str, _Channels]] = field(default_factory=dict)
    critical_layers: list[int | str] = field(default_factory=list)
    critical_ops: list[str] = field(default_factory=list)
    avalanche_points: list[list[int | str]] = field(default_factory=list)
    critical_threshold: Annotated[dict[str, Any], _Threshold] = field(default_factory=dict)
    method: str = "measure"
    agreement: Annotated[dict[str, Any], dict[str, _Agreement]] = field(default_factory=dict)
    weights: Annotated[dict[str, Any], _Weights | _None] = field(default_factory=dict)
    sqnr: Annotated[dict[str, Any], _Sqnr | _None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: Annotated[dict[str, Any], _Provenance] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels that were measured, ascending."""
        return tuple(float(level) for level in self.noise["levels"])

    @property
    def base_level(self) -> float:
        """The level that rankings, classes and the flat tables refer to."""
        return float(self.noise["base_level"])

    @property
    def base_key(self) -> str:
        """``base_level`` as the key that the ``levels`` and ``measured`` tables use."""
        return level_key(self.base_level)

    @property
    def format(self) -> str | None:
        """The number format whose error perturbed, or None where noise did."""
        return self.perturbation.format

    @property
    def perturbation(self) -> Perturbation:
        """What perturbed; raises :class:`InputError` for a name that this version does not know."""
        return perturbation(str(self.noise["kind"]))

    @property
    def unit_error(self) -> float:
        """The relative error of level 1: 1 for noise, that of a format on normal values."""
        return float(self.noise.get("unit_error", 1.0))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Noise seeds that every score is the mean over."""
        return tuple(int(seed) for seed in self.noise["seeds"])

    @property
    def samples(self) -> int:
        """Number of samples that every number is computed from."""
        return int(self.task["samples"])

    @property
    def confidence(self) -> float:
        """Confidence of every interval, 0.95 where the record does not say."""
        return float(self.statistics.get("confidence", 0.95))

    @property
    def second_order_fails(self) -> bool | None:
        """Whether predictions at ``base_level`` are off beyond what second order explains; None where nothing was compared."""
        found = self.agreement.get(self.base_key)
        return None if found is None else bool(found["second_order_fails"])

    def at_base(self, kind: Literal["operator", "layer"], key: str) -> dict[str, Any]:
        """Return the measured detail of one operator or layer at ``base_level``, empty where there is none."""
        table = self.per_operator_detail if kind == "operator" else self.per_layer_detail
        found: dict[str, Any] = table.get(key, {}).get("levels", {}).get(self.base_key, {})
        return found

    def to_record(self) -> dict[str, Any]:
        """Return the map as plain JSON values; numbers that are not finite become ``None``."""
        record: dict[str, Any] = {"schema": Schema.SENSITIVITY}
        record |= {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        cleaned: dict[str, Any] = jsonable(record | {k: v for k, v in self.extra.items() if k not in record})
        return cleaned

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SensitivityMap:
        """Read a map back from its record.

        Raises :class:`ArtifactError`, one line, when the schema is another one, a required key is missing or a value
        has the wrong type.
        """
        check_schema(record, Schema.SENSITIVITY, "sensitivity map")
        validate(_checker(), dict(record), "sensitivity map")
        known = {item.name for item in fields(cls)} - {"extra"}
        try:
            own = copy.deepcopy(dict(record))
        except RecursionError as error:
            raise ArtifactError("sensitivity map: it is nested too deeply") from error
        values = {key: value for key, value in own.items() if key in known}
        extra = {key: value for key, value in own.items() if key not in known and key != "schema"}
        return cls(**values, extra=extra)


@cache
def _checker() -> type[BaseModel]:
    """Return the model that a record is checked with: the fields of the map, as their annotations describe them."""
    hints = get_type_hints(SensitivityMap, include_extras=True)
    wanted: dict[str, Any] = {
        item.name: (
            get_args(hints[item.name])[-1] if hasattr(hints[item.name], "__metadata__") else hints[item.name],
            ... if item.default is item.default_factory is MISSING else None,
        )
        for item in fields(SensitivityMap)
        if item.name != "extra"
    }
    return create_model("SensitivityRecord", __base__=_Part, **wanted)


def level_key(level: float) -> str:
    """Return a noise level as an artifact key: the shortest decimal, ``0.05 -> "0.05"``, ``1.0 -> "1"``."""
    return f"{level:.12g}"


def layer_label(label: str) -> int | str:
    """Return a layer label as artifacts list it: an integer for ``"3"``, the text for ``"decoder.block:3"``."""
    return int(label) if label.isascii() and label.isdigit() else label
