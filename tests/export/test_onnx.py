"""ONNX files: onnxruntime returns what the Program returns; the integers are those of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from aqnfx.errors import InputError
from aqnfx.export.job import Exported
from aqnfx.export.onnx import export_onnx
from aqnfx.export.qdq import DOMAIN, PLACEHOLDER, expand
from aqnfx.numerics.formats import parse_format, quantize
from tests.export.conftest import Case, batch, kl

Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down"))
WEIGHTS = {
    Q: {"weight": "int8:row"}, K: {"weight": "int4:g32"}, V: {"weight": "int4:row:asym"}, GATE: {"weight": "int8:g16:asym"},
    UP: {"weight": "int8:tensor"}, DOWN: {"weight": "int4:g32:fp32"}, "lm_head": {"weight": "int4:row"},
}  # fmt: skip
INPUTS = {
    "model.layers.1.self_attn.q_proj": {"input": "int8:token"}, "model.layers.1.self_attn.k_proj": {"input": "int8:g32"},
    "model.layers.1.mlp.down_proj": {"input": "int4:token"}, "model.layers.1.mlp.up_proj": {"input": "int8:tensor"},
    "model.layers.1.self_attn": {"key": "int8:row", "value": "int8:row"},
}  # fmt: skip
FORMATS = WEIGHTS | INPUTS


def run(path: Path, given: dict[str, torch.Tensor], accuracy: str = "1") -> torch.Tensor:
    """Logits of onnxruntime, which by default (4) rounds the inputs of 4-bit products to 8 bits; 1 is float32."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
    return torch.from_numpy(logits)


def longer() -> dict[str, torch.Tensor]:
    found = {name: value.repeat(2, 2) for name, value in batch().items()}
    found["attention_mask"][0, 15:] = 0
    return found


@pytest.fixture(scope="module")
def written(tied: Case) -> Exported:
    """Exporting takes seconds, so tests share one; its head is tied."""
    return export_onnx(tied.job(FORMATS), tied.new(), check=False)


@torch.no_grad()
def test_onnxruntime_returns_what_the_program_returns(tied: Case, written: Exported) -> None:
    program = tied.planned(FORMATS)
    for given in (batch(), longer()):
        keep = given["attention_mask"].bool()
        theirs, ours, clean = (z[keep] for z in (run(written.path, given), program(**given).logits, tied.clean(**given).logits))
        assert kl(ours, theirs) < 1e-3 * kl(clean, ours)
        torch.testing.assert_close(theirs, ours, atol=5e-3, rtol=0.0)


@torch.no_grad()
def test_onnxruntime_rounds_the_inputs_of_narrow_products_unless_told_otherwise(tied: Case, written: Exported) -> None:
    ours, default = tied.planned(FORMATS)(**batch()).logits, run(written.path, batch(), accuracy="4")
    assert kl(ours, run(written.path, batch())) < 1e-3 * kl(ours, default)


@pytest.mark.parametrize("name", ["int8:row", "int4:row", "int8:g16", "int4:g32:fp32", "int8:tensor"])
def test_values_are_stored_as_the_format_says_bit_for_bit(name: str) -> None:
    """One placeholder by itself: rows of zeros, ties and very different sizes."""
    fmt, random = parse_format(name), torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 64, generator=random) * 2.0 ** torch.randint(-20, 20, (2, 7, 1), generator=random)
    x[0, 1], x[1, 2, :32], x[0, 2] = 0.0, 0.0, torch.arange(64) - 31.5
    whole = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", 64])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", 64])
    node = helper.make_node(PLACEHOLDER, ["x"], ["y"], domain=DOMAIN, format=fmt.name, dim=2, rank=3, width=64)
    model = helper.make_model(
        helper.make_graph([node], "one", [whole], [out]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    assert expand(model) == (0, 0)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), quantize(x, fmt))


def test_weights_are_stored_as_integers(written: Exported) -> None:
    model = onnx.load(written.path / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 21
    assert not [node.op_type for node in model.graph.node if node.domain == "aqnfx"]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    scaled = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kinds]
    integers = sorted(kinds[node.input[0]] for node in scaled)
    assert integers == sorted([TensorProto.INT8] * 2 + [TensorProto.INT4] * 3 + [TensorProto.UINT4, TensorProto.UINT8])
    assert not kinds.keys() & {f"graph_module.{name}.weight" for name in (Q, K, V, GATE, UP, DOWN)}


def test_a_tied_embedding_is_not_quantised_with_the_head(tied: Case, written: Exported) -> None:
    model = onnx.load(written.path / "model.onnx")
    floats = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    gathered = [floats[node.input[0]] for node in model.graph.node if node.op_type == "Gather" and node.input[0] in floats]
    embedding = tied.weight("model.embed_tokens").numpy()
    assert [np.array_equal(onnx.numpy_helper.to_array(table), embedding) for table in gathered] == [True]


def test_the_file_shrinks_as_planned(tied: Case, written: Exported) -> None:
    shapes = {name: tuple(tied.weight(name).shape) for name in (Q, K, V, GATE, UP, DOWN)}
    shapes["lm_head"] = tuple(tied.weight("model.embed_tokens").shape)
    planned = sum(parse_format(formats["weight"]).stored_bits(shapes[name]) // 8 for name, formats in WEIGHTS.items())
    assert written.planned_bytes == planned
    assert written.stored_bytes is not None
    wide = 2 * shapes[K][0] * shapes[K][1] // 32  # the bfloat16 scales of int4:g32, in float32
    assert planned + wide <= written.stored_bytes < planned + wide + 2 * shapes[GATE][0] + shapes[V][0]
    model = onnx.load(written.path / "model.onnx")
    total = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    own = 4 * sum(p.numel() for p in tied.job({}).model.parameters())  # the embedding stays beside the head
    others = own - 4 * sum(a * b for name, (a, b) in shapes.items() if name != "lm_head")
    assert abs(total - others - written.stored_bytes) < 1000  # a few constants


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({DOWN: {"weight": "int3:row"}}, "cannot store the weight of model.layers.0.mlp.down_proj in int3:row"),
        ({DOWN: {"weight": "mxfp4"}}, "what works: int8 and int4"),
        ({DOWN: {"weight": "fp8_e4m3:row"}}, "no such integers"),
        ({DOWN: {"weight": "int8:row", "input": "int8:token:asym"}}, "zero points that are read off the values"),
        ({DOWN: {"weight": "int8:g40"}}, "groups of 40 and rows of 96"),
    ],
)
def test_what_qdq_does_not_have_is_refused(case: Case, formats: dict[str, dict[str, str]], words: str) -> None:
    job, out = case.job(formats), case.new()
    with pytest.raises(InputError) as error:
        export_onnx(job, out, check=False)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_other_dtypes_are_refused(case: Case) -> None:
    job = case.job({DOWN: {"weight": "int8:row"}})
    job.model.to(torch.bfloat16)
    with pytest.raises(InputError, match="onnx exports float32"):
        export_onnx(job, case.new(), check=False)

