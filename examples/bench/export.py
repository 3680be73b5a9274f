"""How far an exported model is from the Program that was measured: KL on tinygsm's own problems, target by target.

``python examples/bench/export.py`` prints a table: nats per token between the clean model and the plan, and between the plan
and what the target makes of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import finish
from torch import Tensor, nn

import aqnfx
from aqnfx.artifacts import write_json
from aqnfx.data import embedded_model, embedded_problems
from aqnfx.export.job import Job
from aqnfx.export.targets import TARGETS
from aqnfx.graph.assignments import Assignment
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.loading import load_model
from aqnfx.planning.precision_plan import PrecisionPlan

CASES: tuple[tuple[str, str, str | None, dict[str, str]], ...] = (
    ("torchao", "int8:row", None, {}),
    ("torchao", "int4:g32", None, {}),
    ("torchao", "int4:g32", None, {"dtype": "bfloat16"}),
    ("torchao", "int8:row", "int8:token:asym", {}),
    ("torchao", "int8:row", "int8:token", {}),
    ("compressed-tensors", "int8:row", None, {}),
    ("compressed-tensors", "int4:g32", None, {}),
    ("compressed-tensors", "nvfp4", None, {}),
    ("compressed-tensors", "fp8_e4m3:row", "fp8_e4m3:token", {}),
    ("compressed-tensors", "int8:row", "int8:token", {}),
    ("onnx", "int8:row", "int8:token", {}),
    ("onnx", "int4:g32", None, {}),
    ("modelopt", "int8:row", "int8:token", {}),
    ("modelopt", "int4:g32:fp32", None, {}),
    ("modelopt", "int4:g32", None, {}),
)


def kl(reference: Tensor, other: Tensor, mask: Tensor) -> float:
    p, q = (torch.log_softmax(x[mask].double(), -1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def run(target: str, path: Path, given: dict[str, Tensor], accuracy: str) -> Tensor:
    """Logits of the exported model with the target's own software."""
    from transformers import AutoModelForCausalLM

    if target == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
        session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])
    model: nn.Module
    if target == "modelopt":
        import modelopt.torch.quantization as mtq
        import yaml

        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
        model = mtq.quantize(model, yaml.safe_load(path.read_text("utf-8")))
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    logits: Tensor = model(**given).logits
    return logits.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="file of the results")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model())
    problems = [json.loads(line) for line in embedded_problems().read_text("utf-8").splitlines()[: arguments.samples]]
    given = dict(tokenizer([f"{p['question']}\n{p['answer']}" for p in problems], return_tensors="pt", padding=True))
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    mask = given["attention_mask"].bool()
    clean = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace("tinygsm"))
    digest = model_digest(clean)
    modules = sorted({site.module for site in clean.sites if site.op == "linear" and site.layer is not None})
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        reference = clean(**given).logits
        for index, (target, weight, inputs, options) in enumerate(CASES):
            assignment = Assignment(weight=weight, input=inputs)
            plan = PrecisionPlan(
                model={"name": "tinygsm", "digest": digest}, assignments=dict.fromkeys(modules, assignment), avg_bits=4,
                effective_bits=4, bytes=1,
            )  # fmt: skip
            path = write_json(Path(directory) / f"{index}.json", plan.to_record())
            suffix = ".yaml" if target == "modelopt" else ""
            given_options = {"dtype": "float32", **options} if target == "torchao" else options
            # As export_plan does, but for tracing the model every time.
            job = Job(path=str(path), plan=plan, model=load_model("tinygsm"), program=clean)
            found = TARGETS[target].load()(job, Path(directory) / f"out{index}{suffix}", check=False, **given_options)
            planned = aqnfx.Pipeline.parse(f'apply-plan{{plan="{path}"}}')(clean)(**given).logits
            for accuracy in ("1", "4") if target == "onnx" and weight.startswith("int4") else ("1",):
                logits = run(target, found.path, given, accuracy)
                rows.append({
                    "target": target, "weight": weight, "input": inputs, "options": options, "accuracy": accuracy,
                    "clean_to_plan": kl(reference, planned, mask), "plan_to_exported": kl(planned, logits, mask),
                    "clean_to_exported": kl(reference, logits, mask), "planned_bytes": found.planned_bytes,
                    "stored_bytes": found.stored_bytes,
                })  # fmt: skip
                print({key: f"{v:.3g}" if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    finish("export", {"model": "tinygsm", "samples": len(problems), "tokens": int(mask.sum()), "rows": rows}, arguments)


if __name__ == "__main__":
    main()
