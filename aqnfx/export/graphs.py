"""What exports of graphs have in common: the Program of a plan, and its inputs and outputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aqnfx.export.job import Job
from aqnfx.graph.edit import output_node
from aqnfx.graph.program import Program
from aqnfx.passes.apply_plan import ApplyPlan
from aqnfx.passes.pipeline import Pipeline

OPERATORS = "aqnfx.ops"
"""The module whose import registers the operations that graphs hold."""


def holds_operators(program: Program) -> bool:
    """Return whether the graph calls operations of this project."""
    return any("aqnfx." in str(node.target) for node in program.graph.nodes if node.op == "call_function")


def planned_program(job: Job, pipeline: str = "") -> Program:
    """Return the job's Program after ``apply-plan`` and the passes of ``pipeline``; raises what a pass raises."""
    program = ApplyPlan(plan=job.path)(job.program)
    return Pipeline.parse(pipeline)(program) if pipeline else program


def output_names(program: Program, count: int) -> tuple[str, ...]:
    """Return a name for each of the graph's ``count`` outputs: the model's own where it returns a mapping of tensors."""
    found = pytree.tree_unflatten(list(range(program.signature.out_spec.num_leaves)), program.signature.out_spec)
    if isinstance(found, Mapping):
        names = {index: str(name) for name, index in found.items() if isinstance(index, int)}
        if len(names) == count:
            return tuple(names[index] for index in range(count))
    return tuple(f"output_{index}" for index in range(count))


def examples(program: Program) -> dict[str, torch.Tensor]:
    """Return the tensors that the Program was traced with, by the names of its inputs."""
    sig = program.signature
    return {n: d for n, d in zip(sig.names, sig.defaults, strict=True) if isinstance(d, torch.Tensor)}


def outputs_of(program: Program) -> list[Any]:
    """Return what the graph's output node returns, in order."""
    return list(pytree.tree_leaves(output_node(program.graph).args[0], is_leaf=lambda x: x is None))
