"""IntegratedDiagnostic: the familiar one-object way to the same engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aqnfx.diagnosis.diagnose import diagnose
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.errors import InputError
from aqnfx.graph.program import Program
from aqnfx.probes.data.examples import Data
from aqnfx.reporting.report import build_report, report_markdown, save_report


class IntegratedDiagnostic:
    """Diagnose a model on ``test_data``; what :func:`aqnfx.diagnose` does, with the result kept on the object.

    ``calibration_data`` (default: the test data) is what the magnitudes of channels are read on; ``options`` are further
    fields of :class:`~aqnfx.diagnosis.options.Options` and ``tokenizer``.
    """

    def __init__(
        self,
        model: nn.Module | Program | str | Path,
        test_data: Data,
        calibration_data: Data | None = None,
        **options: Any,
    ) -> None:
        self.model, self.test_data, self.calibration_data = model, test_data, calibration_data
        self.options = options
        self.sensitivity_map: SensitivityMap | None = None

    def run_full_diagnosis(
        self, noise_scale: float = 0.05, window_size: int | None = None, outlier_threshold: float = 10.0
    ) -> SensitivityMap:
        """Diagnose operator kinds, layers, windows and channels at ``noise_scale`` and return the sensitivity map.

        Channels whose mean magnitude on the calibration data is ``outlier_threshold`` times the median channel's are
        outliers. Further levels may be given as ``levels`` to the constructor, ``method="measure"`` leaves predictions
        and channels out.
        """
        levels = tuple(sorted({*self.options.get("levels", ()), noise_scale}))
        rest = {k: v for k, v in self.options.items() if k not in ("levels", "base_level", "window", "outlier_threshold")}
        rest = {"method": "both"} | rest
        calibration = self.calibration_data if rest["method"] != "measure" else None
        self.sensitivity_map = diagnose(
            self.model, self.test_data, levels=levels, base_level=noise_scale, window=window_size,
            calibration=calibration, outlier_threshold=outlier_threshold, **rest,
        )  # fmt: skip
        return self.sensitivity_map

    def _result(self) -> SensitivityMap:
        if self.sensitivity_map is None:
            raise InputError("there is no result yet; call run_full_diagnosis() first")
        return self.sensitivity_map

    def generate_report(self) -> str:
        """Return the report as Markdown; raises :class:`InputError` before :meth:`run_full_diagnosis`."""
        return report_markdown(self._result(), build_report(self._result()))

    def save_report(self, path: str | Path) -> dict[str, Path]:
        """Write map, report and Markdown into the directory ``path``; returns the files' paths."""
        return save_report(self._result(), path)
