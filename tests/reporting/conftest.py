"""Makes the synthetic runs of the diagnosis tests importable here: reports are tested on real maps."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "diagnosis"))
