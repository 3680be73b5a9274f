"""Formats that other mixed-precision tools choose for each linear layer, with the time and memory of choosing them.

    python -m venv rivals && rivals/bin/pip install torch==2.13.0 transformers==5.23.0
    rivals/bin/pip install nvidia-modelopt==0.47.0 auto-round==0.16.1 nncf==3.4.0
    rivals/bin/python examples/bench/rivals.py --tool modelopt --menu "int4, int8" --bits 5 --bits 6 \\
        --samples SAMPLES.json --model DIR --out OUT.json [--lm-head]

SAMPLES.json is {"seed": 0, "chosen": [[token, ...], ...]}, sequences of one length. A budget is the average of bits per
weight of the planned linears, scales not counted. The file grows: a row of the same tool, model, menu, budget and seed
is replaced.
Every budget runs in a process of its own. Linux only (memory is read from /proc); the tools need nothing of aqnfx.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MENUS = {
    "int4, int8": ("int4:g32", "int8:g32"),
    "int2 to bf16": ("int2:g32:asym", "int3:g32", "int4:g32", "int6:g32", "int8:g32", "bf16"),
    "mxfp4, mxfp8, weights and inputs": ("mxfp4/mxfp4", "mxfp8_e4m3/mxfp8_e4m3"),
}
PACKAGES = {
    "modelopt": "nvidia-modelopt", "modelopt-ungrouped": "nvidia-modelopt", "autoround": "auto-round", "nncf": "nncf"
}  # fmt: skip
UNSUPPORTED = {
    ("nncf", "int2 to bf16"): "it chooses between two formats",
    ("nncf", "mxfp4, mxfp8, weights and inputs"): "its PyTorch backend has no MX formats",
}
GROUP = 32
BATCH = 8
KEY = ("tool", "model", "menu", "bits", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    tool: str
    menu: str
    bits: float
    samples: Path
    model: Path
    lm_head: bool


@dataclass(slots=True)
class Cost:
    """What choosing took."""

    seconds: float = 0.0
    memory_mib: float = 0.0


@dataclass(slots=True)
class Choice:
    """What a tool chose."""

    assignments: dict[str, str]
    cost: Cost
    notes: list[str] = field(default_factory=list)


def width(text: str) -> int:
    """Return the bits of a weight in a format, without scales."""
    found = re.search(r"\d+", text)
    assert found is not None, text
    return int(found.group())


def average(assignments: dict[str, str], sizes: dict[str, int]) -> float:
    """Return the average of bits per weight, without scales."""
    return sum(width(assignments[name]) * size for name, size in sizes.items()) / sum(sizes.values())


def resident_mib(name: str) -> float:
    """Return a memory figure of this process: VmRSS, now, or VmHWM, the most since the last reset."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None, name
    return int(found.group(1)) / 1024


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Fill in the time of the block, and by how much memory grew at its peak."""
    cost = Cost()
    with contextlib.suppress(OSError):  # where it is forbidden, the peak of loading counts too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started = resident_mib("VmRSS"), time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - started
    cost.memory_mib = resident_mib("VmHWM") - before


def linears(model: torch.nn.Module, task: Task) -> dict[str, int]:
    """Return the planned linears and how many weights each has."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (task.lm_head or module is not head)
    }


def left_out(model: torch.nn.Module, sizes: dict[str, int]) -> list[str]:
    """Return the linears that are not planned."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in sizes]


def affine_int2(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Return a weight in 2 bits with a zero point: a ModelOpt backend, because its own 2 bits are symmetric."""
    rows = torch.nn.functional.pad(inputs, (0, -inputs.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 3).clamp(min=1e-9)
    zero = (-low / scale).round()
    made = (((rows / scale).round() + zero).clamp(0, 3) - zero) * scale
    return made.flatten(-2)[..., : inputs.shape[-1]]


def mx(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Return a tensor in MXFP4 or MXFP8: a ModelOpt backend, because its own MX formats need CUDA."""
    exponent, mantissa = quantizer.num_bits
    emax, largest = (2, 6.0) if exponent == 2 else (8, 448.0)
    blocks = torch.nn.functional.pad(inputs, (0, -inputs.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-126).log2().floor() - emax)
    scaled = blocks / scale
    # The step between values of one binade; below the normal numbers it stays that of the least binade.
    step = torch.exp2(scaled.abs().clamp(min=2.0 ** (2 - 2 ** (exponent - 1))).log2().floor() - mantissa)
    made = ((scaled / step).round() * step).clamp(-largest, largest) * scale
    return made.flatten(-2)[..., : inputs.shape[-1]]


def modelopt_format(text: str) -> dict[str, Any]:
    """Return a format as ModelOpt has it."""
    cfg: dict[str, Any] = {"num_bits": width(text), "block_sizes": {-1: GROUP}}
    if text.startswith("mxfp"):
        cfg = {
            "num_bits": (2, 1) if width(text) == 4 else (4, 3),
            "block_sizes": {-1: GROUP, "type": "dynamic", "scale_bits": (8, 0)},
            "backend": "mx",
        }
    elif text.endswith(":asym"):
        cfg["backend"] = "affine_int2"
    operands = ("*weight_quantizer", "*input_quantizer") if "/" in text else ("*weight_quantizer",)
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *({"quantizer_name": operand, "cfg": cfg, "enable": True} for operand in operands),
        ],
        "algorithm": "max" if "/" not in text else None,  # MX scales come from the values at hand
    }


def run_modelopt(model: torch.nn.Module, ids: torch.Tensor, sizes: dict[str, int], task: Task) -> Choice:
    """Let ModelOpt's gradient-based auto_quantize choose."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
    from modelopt.torch.quantization.nn import register_quant_backend

    register_quant_backend("affine_int2", affine_int2)
    register_quant_backend("mx", mx)
    if task.tool == "modelopt-ungrouped":
        AutoQuantizeGradientSearcher.quant_grouping_rules = []
    texts = [text for text in MENUS[task.menu] if text != "bf16"]
    formats = [modelopt_format(text) for text in texts]
    skipped = left_out(model, sizes)
    with measured() as cost:
        _, state = mtq.auto_quantize(
            model,
            # Linears that are left out would count as 16 bits, in the budget and in what it is a share of.
            constraints={"effective_bits": task.bits, "cost": {"excluded_module_name_patterns": skipped}},
            quantization_formats=formats,
            # Without this rule any layer may also stay as it is.
            module_search_spaces=[{
                "module_name_patterns": list(sizes), "quantization_formats": formats,
                "allow_no_quant": "bf16" in MENUS[task.menu],
            }],
            data_loader=[{"input_ids": batch, "labels": batch} for batch in ids.split(BATCH)],
            forward_step=lambda model, batch: model(**batch),
            # A sum over tokens: the scores of a mean are so small that its solver's tolerance decides between layers.
            loss_func=lambda output, batch: output.loss * batch["labels"][:, 1:].numel(),
            disabled_layers=skipped or None,
            method="gradient",
        )  # fmt: skip
    chosen: dict[str, str] = {}
    groups = 0
    by_width = {width(text): text for text in MENUS[task.menu]}
    for group, recipe in state["best"]["recipe"].items():
        names = state["candidate_stats"][group]["module_names"]
        if set(names) <= sizes.keys():  # what is left out is a group that keeps 16 bits
            chosen.update(dict.fromkeys(names, by_width[round(recipe.compression * 16)]))
            groups += 1
    notes = [f"batches of {BATCH}, {-(-len(ids) // BATCH)} scoring steps", f"{groups} groups of layers"]
    if task.menu.startswith("mxfp"):
        notes.append("MX rounding by a backend of this script, its own needs CUDA")
    return Choice(chosen, cost, notes)


def autoround_option(text: str) -> Any:
    """Return a format as AutoRound has it."""
    from auto_round.schemes import QuantizationScheme

    presets = {"mxfp4/mxfp4": "MXFP4", "mxfp8_e4m3/mxfp8_e4m3": "MXFP8", "bf16": "BF16"}
    if text in presets:
        return presets[text]
    return QuantizationScheme(
        bits=width(text), group_size=GROUP, sym=not text.endswith(":asym"), data_type="int", act_bits=16
    )


def run_autoround(model: torch.nn.Module, ids: torch.Tensor, sizes: dict[str, int], task: Task) -> Choice:
    """Let AutoRound's AutoScheme choose; what comes after it, tuning the rounding, is not run."""
    from auto_round import AutoScheme
    from auto_round.auto_scheme import delta_loss
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme

    # Its own loader would draw and cut texts; these are the tokens that every tool sees.
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids.split(BATCH)]
    delta_loss.get_dataloader = lambda *_, **__: batches
    scheme = AutoScheme(
        avg_bits=task.bits, options=[autoround_option(text) for text in MENUS[task.menu]], ignore_scale_zp_bits=True,
        nsamples=len(ids), seqlen=ids.shape[1], batch_size=BATCH,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    # Scores are cached on disk by the names of model and data, not by what is in them.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AR_AUTO_SCHEME_CACHE"] = cache
        with measured() as cost:
            maker = GenScheme(scheme, model, list(sizes), {}, dataset="samples", device_map="cpu", tokenizer=tokenizer)
            found = maker.get_layer_config()
    by_width = {width(text): text for text in MENUS[task.menu]}
    notes = [f"batches of {BATCH}, every format scored with all layers in it"]
    if task.menu.startswith("mxfp"):
        notes.append("its scores hold the errors of weights only")  # 0.16.1 does not round inputs while it scores
    if task.lm_head:
        notes.append("its rule gives lm_head at least 6 bits where the budget allows")
    return Choice({name: by_width[found[name]["bits"]] for name in sizes}, cost, notes)


def nncf_once(model: torch.nn.Module, ids: torch.Tensor, sizes: dict[str, int], ratio: float) -> Choice:
    """Let NNCF put this share of the weights into 4 bits."""
    os.environ.setdefault("NNCF_CI", "1")  # or every run reports itself over the network, in its time
    import nncf
    from nncf.torch.function_hook import get_hook_storage

    made = copy.deepcopy(model)
    # A head that shares its weight with the embedding goes by the embedding's name.
    names = {parameter: name for name, parameter in made.named_parameters()}
    owner = {names[made.get_submodule(name).weight]: name for name in sizes}
    embeddings = [name for name, module in made.named_modules() if isinstance(module, torch.nn.Embedding)]
    ignored = [f"{name.replace('.', '/')}/.*" for name in [*embeddings, *left_out(made, sizes)]]
    with measured() as cost:
        made = nncf.compress_weights(
            made,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=ratio,
            group_size=GROUP,
            dataset=nncf.Dataset([{"input_ids": row[None]} for row in ids]),
            sensitivity_metric=nncf.SensitivityMetric.HESSIAN_INPUT_ACTIVATION,
            backup_mode=nncf.BackupMode.INT8_SYM,
            all_layers=True,  # the last linear too, unless it is left out
            ignored_scope=nncf.IgnoredScope(patterns=ignored),
            # A group that does not divide a layer is an error by default; groups have no part in the choice.
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=1
            ),
        )
    chosen = {}
    for hook, module in get_hook_storage(made).named_hooks():
        # post_hooks.model:layers:0:mlp:up_proj:weight__0.0
        name = owner[hook.split(".")[1].rsplit("__", 1)[0].replace(":", ".")]
        chosen[name] = "int8:g32" if type(module).__name__.startswith("INT8") else "int4:g32"
    return Choice(chosen, cost)


def run_nncf(model: torch.nn.Module, ids: torch.Tensor, sizes: dict[str, int], task: Task) -> Choice:
    """Let NNCF choose by its data-aware metric, with the least share of 4 bits that keeps the budget.

    It fills the share from the least sensitive layer on, stays below it, and ends at the first layer that does not fit.
    """
    total = sum(sizes.values())
    ratio = min(1.0, (8 - task.bits) / 4 + max(sizes.values()) / total)
    best = nncf_once(model, ids, sizes, ratio)
    cost, runs = best.cost, 1  # of the first run: a share is an argument, and one run is what it takes
    while True:
        four = sum(size for name, size in sizes.items() if width(best.assignments[name]) == 4)
        made = nncf_once(model, ids, sizes, four / total)
        runs += 1
        if average(made.assignments, sizes) > task.bits:
            break
        best = made
    return Choice(best.assignments, cost, [
        "one sequence at a time, HESSIAN_INPUT_ACTIVATION; the time includes packing the weights",
        f"cost of one run; {runs} found the share",
    ])  # fmt: skip


RUN = {"modelopt": run_modelopt, "modelopt-ungrouped": run_modelopt, "autoround": run_autoround, "nncf": run_nncf}


def row_for(task: Task) -> dict[str, Any]:
    """Return what a tool chose for one budget, checked against it."""
    data = json.loads(task.samples.read_text(encoding="utf-8"))
    ids = torch.tensor(data["chosen"])
    torch.manual_seed(data["seed"])
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32).eval()
    sizes = linears(model, task)
    choice = RUN[task.tool](model, ids, sizes, task)
    bits = average(choice.assignments, sizes)
    if bits > task.bits + 1e-6 or choice.assignments.keys() != sizes.keys():
        raise RuntimeError(f"{task.tool}: asked {task.bits:g} bits for {len(sizes)} linears, got {bits:g} for "
                           f"{len(choice.assignments)}")  # fmt: skip
    return {
        "tool": task.tool, "version": importlib.metadata.version(PACKAGES[task.tool]), "model": task.model.name,
        "menu": task.menu, "bits": task.bits, "seed": data["seed"], "lm_head": task.lm_head, "average_bits": bits,
        "assignments": {name: choice.assignments[name] for name in sizes}, "seconds": choice.cost.seconds,
        "memory_mib": choice.cost.memory_mib, "notes": "; ".join(choice.notes),
    }  # fmt: skip


def write(out: Path, row: dict[str, Any]) -> None:
    """Add a row to the file in place of the one of the same key."""
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in KEY)]
    out.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


def problem(tool: str, menu: str) -> str | None:
    """Return why a tool cannot run here."""
    try:
        importlib.metadata.version(PACKAGES[tool])
    except importlib.metadata.PackageNotFoundError:
        return f"{tool} needs {PACKAGES[tool]}, which is not installed: pip install {PACKAGES[tool]}"
    reason = UNSUPPORTED.get((tool, menu))
    return f"{tool} cannot take the menu {menu!r}: {reason}" if reason else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=tuple(PACKAGES), required=True)
    parser.add_argument("--menu", choices=tuple(MENUS), required=True)
    parser.add_argument("--bits", type=float, action="append", required=True, help="average, scales not counted")
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lm-head", action="store_true", help="plan the output layer too")
    asked = parser.parse_args()
    if reason := problem(asked.tool, asked.menu):
        print(f"rivals: {reason}", file=sys.stderr)
        raise SystemExit(2)
    tasks = [
        Task(
            tool=asked.tool, menu=asked.menu, bits=bits, samples=asked.samples, model=asked.model, lm_head=asked.lm_head
        )
        for bits in asked.bits
    ]
    # A fresh process each: memory that one budget was given would not be seen to grow in the next.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for row in pool.map(row_for, tasks):
            write(asked.out, row)
            print(f"{row['tool']}, {row['menu']}: {row['average_bits']:.4f} of {row['bits']:g} bits, "
                  f"{row['seconds']:.1f} s, {row['memory_mib']:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
