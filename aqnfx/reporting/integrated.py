"""IntegratedDiagnostic: the familiar one-object way to the same engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from aqnfx.diagnosis.diagnose import diagnose
from aqnfx.diagnosis.sensitivity import SensitivityMap
from aqnfx.errors import InputError, NotYetError
from aqnfx.graph.program import Program
from aqnfx.reporting.markdown import report_markdown
from aqnfx.reporting.report import build_report, save_report

Data = str | Path | Sequence[str | Mapping[str, str]]


class IntegratedDiagnostic:
    """Diagnose a model on ``test_data``; what :func:`aqnfx.diagnose` does, with the result kept on the object.

    ``calibration_data`` is for the channel level, which this version does not have; ``options`` are further fields of
    :class:`~aqnfx.diagnosis.options.Options` and ``tokenizer``.
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
        self, noise_scale: float = 0.05, window_size: int | None = None, outlier_threshold: float | None = None
    ) -> SensitivityMap:
        """Probe operator kinds, layers and windows at ``noise_scale`` and return the sensitivity map.

        Further levels may be given as ``levels`` to the constructor. Raises :class:`NotYetError` when
        ``outlier_threshold`` asks for the channel level.
        """
        if outlier_threshold is not None:
            raise NotYetError(
                f"outlier_threshold={outlier_threshold} asks for the channel level, which this version does not have yet; "
                "leave it out to get operators, layers and windows"
            )
        levels = tuple(sorted({*self.options.get("levels", ()), noise_scale}))
        rest = {k: v for k, v in self.options.items() if k not in ("levels", "base_level", "window")}
        self.sensitivity_map = diagnose(
            self.model, self.test_data, levels=levels, base_level=noise_scale, window=window_size, **rest
        )
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
