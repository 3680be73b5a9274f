"""Number formats: elements and their rounding, names, and what storing a tensor in a format does to it."""

from aqnfx.numerics.formats.elements import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP16,
    TF32,
    Element,
    FloatElement,
    IntElement,
    round_element,
)
from aqnfx.numerics.formats.names import KNOWN, Format, Grouping, Scale, parse_format
from aqnfx.numerics.formats.quantize import (
    Codes,
    Stored,
    encode,
    quantize,
    quantize_group,
    relative_error,
    unmasked,
)

__all__ = [
    "BF16", "E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "FP16", "KNOWN", "TF32", "Codes", "Element", "FloatElement", "Format",
    "Grouping", "IntElement", "Scale", "Stored", "encode", "parse_format", "quantize", "quantize_group", "relative_error",
    "round_element", "unmasked",
]  # fmt: skip
