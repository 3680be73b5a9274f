"""Makes ``synthetic_run`` importable: pytest imports test files by path and adds no directory itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
