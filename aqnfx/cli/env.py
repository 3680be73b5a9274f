"""aqnfx env: what this installation runs on."""

from __future__ import annotations

import typer


def command(json_output: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Print versions, devices and threads, for reports and bug reports."""
    import json
    import platform

    import torch
    import transformers

    import aqnfx

    facts = {
        "aqnfx": aqnfx.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
    if json_output:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:13} {value}")
