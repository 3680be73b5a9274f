"""Calibrated ranges: the least and the largest value that each site was seen to take, read from a scan."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from aqnfx.artifacts import Schema
from aqnfx.errors import InputError

Range = tuple[float, float]
_LARGEST = torch.finfo(torch.float32).max


def read_ranges(path: str | Path) -> dict[str, Range]:
    """Return site id -> (low, high) of the ``ranges`` in a scan's JSON file; raises :class:`InputError` for any other."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the calibration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the calibration {path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(record, dict) or record.get("schema") != Schema.SCAN or not isinstance(record.get("ranges"), dict):
        raise InputError(f"{path} is not a scan ({Schema.SCAN}) with ranges; make one by aqnfx scan MODEL --data FILE --out DIR")
    return {str(site): _range(path, site, pair) for site, pair in record["ranges"].items()}


def _range(path: str | Path, site: str, pair: object) -> Range:
    if isinstance(pair, list) and len(pair) == 2 and all(type(v) in (int, float) and abs(v) <= _LARGEST for v in pair):
        low, high = (float(v) for v in pair)
        if low <= high:
            return low, high
    raise InputError(f"{path}: the range of {site} is {repr(pair)[:80]}, not two finite fp32 numbers in order")
