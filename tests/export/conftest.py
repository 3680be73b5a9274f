"""Tiny checkpoints, plans for them, and the Programs that the plans make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import aqnfx
from aqnfx.artifacts import write_json
from aqnfx.export.job import Job
from aqnfx.graph.assignments import Assignment
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.loading import load_model
from aqnfx.graph.program import Program
from aqnfx.planning.precision_plan import PrecisionPlan
from tests.families import build, inputs

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


class Case:
    """A checkpoint on disk, its clean Program, and plans for it. Tracing takes long, so tests share cases."""

    def __init__(self, directory: Path, family: str = "llama", **options: Any) -> None:
        self.directory = directory
        self.checkpoint = directory / "model"
        model: Any = build(family, **({**WIDE, **options} if family == "llama" else options))
        model.save_pretrained(self.checkpoint)
        self.clean = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(self.checkpoint)))
        self.digest = model_digest(self.clean)
        self.count = 0

    def new(self, name: str = "out") -> Path:
        self.count += 1
        return self.directory / f"{name}{self.count}"

    def plan(self, formats: dict[str, dict[str, str]], **fields: Any) -> PrecisionPlan:
        model = {"name": str(self.checkpoint), "digest": self.digest, "model_type": "llama"}
        given: dict[str, Any] = {"model": model, "avg_bits": 6.0, "effective_bits": 6.5, "bytes": 1, **fields}
        return PrecisionPlan(assignments={module: Assignment(**roles) for module, roles in formats.items()}, **given)

    def write(self, formats: dict[str, dict[str, str]], **fields: Any) -> Path:
        return write_json(self.new("plan").with_suffix(".json"), self.plan(formats, **fields).to_record())

    def job(self, formats: dict[str, dict[str, str]], **fields: Any) -> Job:
        """What open_plan gives, with the Program that there is already."""
        path = self.write(formats, **fields) if formats else "plan.json"
        return Job(path=str(path), plan=self.plan(formats, **fields), model=load_model(str(self.checkpoint)), program=self.clean)

    def planned(self, formats: dict[str, dict[str, str]]) -> Program:
        return aqnfx.Pipeline.parse(f'apply-plan{{plan="{self.write(formats)}"}}')(self.clean)

    def weight(self, module: str) -> Tensor:
        with safe_open(self.checkpoint / "model.safetensors", "pt") as file:
            found: Tensor = file.get_tensor(f"{module}.weight")
            return found


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def batch() -> dict[str, Tensor]:
    return inputs("llama", 2, 12, pad=0)


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean KL divergence in nats per token of two sets of logits."""
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
