"""aqnfx: graph-rewriting passes that turn controlled noise into a measuring instrument for neural networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aqnfx.diagnosis.activation_capture import ActivationCapture as ActivationCapture
    from aqnfx.diagnosis.diagnose import diagnose as diagnose
    from aqnfx.diagnosis.explain.analysis import Analysis as Analysis
    from aqnfx.diagnosis.explain.analysis import analyze as analyze
    from aqnfx.diagnosis.sensitivity_map import SensitivityMap as SensitivityMap
    from aqnfx.errors import AqnfxError as AqnfxError
    from aqnfx.graph.frontend import trace as trace
    from aqnfx.graph.opkinds import OpKind as OpKind
    from aqnfx.graph.program import Program as Program
    from aqnfx.graph.sites import Site as Site
    from aqnfx.live.backend import Backend as Backend
    from aqnfx.live.instrument import Handle as Handle
    from aqnfx.live.instrument import instrument as instrument
    from aqnfx.numerics.metrics import critical_threshold as critical_threshold
    from aqnfx.numerics.metrics import noise_tolerance_index as noise_tolerance_index
    from aqnfx.numerics.metrics import relative_degradation as relative_degradation
    from aqnfx.numerics.metrics import sensitivity_score as sensitivity_score
    from aqnfx.passes.pipeline import Pipeline as Pipeline
    from aqnfx.planning.planner import plan as plan
    from aqnfx.planning.precision_plan import PrecisionPlan as PrecisionPlan
    from aqnfx.reporting.integrated import IntegratedDiagnostic as IntegratedDiagnostic
    from aqnfx.scanning.scan import Scan as Scan
    from aqnfx.scanning.scan import scan as scan

# Public names load their module on first use, so that `import aqnfx` and `aqnfx --help` do not import torch.
_LAZY = {
    "AqnfxError": "aqnfx.errors",
    "trace": "aqnfx.graph.frontend",
    "Program": "aqnfx.graph.program",
    "Site": "aqnfx.graph.sites",
    "OpKind": "aqnfx.graph.opkinds",
    "Pipeline": "aqnfx.passes.pipeline",
    "diagnose": "aqnfx.diagnosis.diagnose",
    "analyze": "aqnfx.diagnosis.explain.analysis",
    "Analysis": "aqnfx.diagnosis.explain.analysis",
    "scan": "aqnfx.scanning.scan",
    "Scan": "aqnfx.scanning.scan",
    "plan": "aqnfx.planning.planner",
    "PrecisionPlan": "aqnfx.planning.precision_plan",
    "instrument": "aqnfx.live.instrument",
    "Handle": "aqnfx.live.instrument",
    "Backend": "aqnfx.live.backend",
    "SensitivityMap": "aqnfx.diagnosis.sensitivity_map",
    "ActivationCapture": "aqnfx.diagnosis.activation_capture",
    "IntegratedDiagnostic": "aqnfx.reporting.integrated",
    "relative_degradation": "aqnfx.numerics.metrics",
    "noise_tolerance_index": "aqnfx.numerics.metrics",
    "critical_threshold": "aqnfx.numerics.metrics",
    "sensitivity_score": "aqnfx.numerics.metrics",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'aqnfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
