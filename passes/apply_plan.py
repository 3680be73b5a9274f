"""apply-plan: the operands of every module as a precision plan stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aqnfx.errors import PassError
from aqnfx.graph.assignments import assigned_sites, read_assignments
from aqnfx.graph.program import Program
from aqnfx.passes.base import Pass
from aqnfx.passes.insert_fake_quant import InsertFakeQuant, insert_nodes


@dataclass(frozen=True, kw_only=True)
class ApplyPlan(Pass):
    """Put an ``aqnfx::fake_quant`` node on every operand that the plan file ``plan`` assigns a format to.

    Weights, inputs, keys and values are then what the plan's formats store; the plan's modules are matched exactly, and one
    that the model does not have is an error. ``gradient`` is the format of the gradients on their way back ("": they pass
    straight through), ``controls`` gives every operand a level, as in ``insert-fake-quant``.
    """

    name: ClassVar[str] = "apply-plan"
    needs: ClassVar[tuple[str, ...]] = ("tag-layers", "tag-ops")
    plan: str = "plan.json"
    gradient: str = ""
    controls: bool = False

    def requires(self, program: Program) -> None:
        """Check the plan against the program before anything is copied."""
        InsertFakeQuant(gradient=self.gradient, controls=self.controls).requires(program)
        if not assigned_sites(program, read_assignments(self.plan)):
            raise PassError(f"{self.name}: {self.plan} stores everything as the model has it; there is nothing to do")

    def run(self, program: Program) -> None:
        """Insert the nodes, format by format."""
        for name, sites in assigned_sites(program, read_assignments(self.plan)).items():
            chosen = tuple(program.places[site].site for site in sites)
            insert_nodes(program, chosen, name, gradient=self.gradient, controls=self.controls, inserted_by=self.name)
