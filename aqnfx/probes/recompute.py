"""Activation checkpointing at block boundaries: what one block saves for its backward pass lives only while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from aqnfx.errors import ModelError
from aqnfx.graph.blocks import number_blocks
from aqnfx.graph.program import Program


class _Recomputed(torch.nn.Module):
    """A block whose forward pass runs again when its gradient is needed (Chen et al. 2016)."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Any) -> Any:
        # Only what carries a gradient is an argument: control buffers change between the passes, and are meant to.
        carried = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad and x.numel()]

        def block(*given: torch.Tensor) -> Any:
            values = list(inputs)
            for i, x in zip(carried, given, strict=True):
                values[i] = x
            return self.block(*values)

        # Nothing in a program draws random numbers from a generator with a state, so there is none to restore.
        return checkpoint(block, *(inputs[i] for i in carried), use_reentrant=False, preserve_rng_state=False)


def checkpointed(program: Program) -> Program:
    """Return a program of the same values that keeps, for a backward pass, only what crosses the boundaries of layers.

    It is for running, not for further passes: its graph calls one module per layer. Accumulators and weights are those of
    ``program``. Raises :class:`ModelError` for a model without layers.
    """
    if not program.layers:
        raise ModelError("checkpointing needs layers to cut between, and the model has none; run without --checkpoint")
    blocks = number_blocks(program)
    split = split_module(program.module, program.module, lambda node: blocks.get(node, 0))
    for name, block in list(split.named_children()):
        if name.startswith("submod_") and isinstance(block, GraphModule):
            setattr(split, name, _Recomputed(block))
    return dataclasses.replace(program, module=split)
