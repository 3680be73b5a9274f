"""Run what an export wrote with its target's own software; a script for a process of its own.

``python child.py JOB``: the JSON file ``JOB`` names the ``target``, the ``path`` of the export, safetensors files of ``inputs``
and ``outputs``, and the ``constants`` of the call. Imports what docs/export.md tells a reader to import, and nothing else of
this project. Outputs are fp32 tensors by name. A failure is one line on stderr, and exit code 3.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PROBE = "Ann has 3 apples and buys 12 more. Übung, naïve?\n"
"""A text that tokenizers before and after are compared on."""


def main(path: str) -> None:
    """Read the job, run it, write what came out."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    job = json.loads(Path(path).read_text("utf-8"))
    try:
        import torch
        from safetensors.torch import load_file, save_file

        torch.set_num_threads(job["threads"])
        with torch.no_grad():
            found = READERS[job["target"]](job, load_file(job["inputs"]))
        save_file({name: value.detach().to(torch.float32).contiguous().clone() for name, value in found.items()}, job["outputs"])
    except Exception as error:  # any software of any target
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {lines[0][:400] if lines else ''}", file=sys.stderr)
        sys.exit(3)


def _end_with_the_parent() -> None:
    # Its end of the pipe closes whatever ends it.
    os.read(0, 1)
    os._exit(3)


def _checkpoint(job: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(job["path"])
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(job["path"], output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            found = sorted(map(str, info[kind]))
            raise ValueError(f"{len(found)} {kind.removesuffix('_keys')} tensors, first {found[0]}")
    result = _call(model.eval(), inputs, job["constants"])
    if job["tokens"] is not None:
        got = transformers.AutoTokenizer.from_pretrained(job["path"])(PROBE)["input_ids"]
        if got != job["tokens"]:
            raise ValueError(f"its tokenizer gives {len(got)} other tokens than the model's")
    return result


def _modelopt(job: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq
    import torch
    import transformers
    import yaml

    config = transformers.AutoConfig.from_pretrained(job["model"])
    kind: Any = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    # Nothing is calibrated: every scale is read off the values that it is for.
    return _call(mtq.quantize(model, yaml.safe_load(Path(job["path"]).read_text("utf-8"))), inputs, job["constants"])


def _call(model: Any, inputs: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return _floats(dict(model(**given, **constants)))


def _floats(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if hasattr(value, "is_floating_point") and value.is_floating_point()}


def _onnx(job: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime
    import torch

    found: dict[str, Any] = {}
    for prefix, entries in (("", {"session.qdq_matmulnbits_accuracy_level": "1"}), ("default/", {})):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        session = onnxruntime.InferenceSession(f"{job['path']}/model.onnx", options, providers=["CPUExecutionProvider"])
        known = {value.name for value in session.get_inputs()}
        values = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in known})
        outputs = [output.name for output in session.get_outputs()]
        found |= {prefix + name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}
    return _floats(found)


def _python(job: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, job["path"])
    from model import load  # type: ignore[import-not-found]

    return _floats(load()(**inputs))


def _pt2(job: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    import torch

    for name in job["imports"]:
        __import__(name)
    return _floats(torch.export.load(job["path"]).module()(**inputs))


READERS: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "torchao": _checkpoint, "compressed-tensors": _checkpoint, "onnx": _onnx, "modelopt": _modelopt, "python": _python,
    "pt2": _pt2,
}  # fmt: skip

if __name__ == "__main__":
    del sys.path[0]  # the folder of this script
    main(sys.argv[1])
