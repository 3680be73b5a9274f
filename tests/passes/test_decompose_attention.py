"""decompose-attention against the fused kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import aqnfx
from aqnfx.graph.opkinds import OpKind
from aqnfx.passes.decompose_attention import attention
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, depth, inputs
from tests.graph.small import generator

CASES = {
    "plain": {}, "scale": {"scale": 0.3}, "causal": {"is_causal": True}, "bool": {"attn_mask": "bool"},
    "float": {"attn_mask": "float"}, "gqa": {"enable_gqa": True}, "gqa-causal": {"enable_gqa": True, "is_causal": True},
    "rows-without-any": {"attn_mask": "empty"}, "float-rows-without-any": {"attn_mask": "-inf"},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("keys", [6, 9])
def test_close_to_the_fused_kernel(options, keys):
    source = generator(2)
    heads = 2 if options.get("enable_gqa") else 4
    query = torch.randn(2, 4, 6, 8, generator=source)
    key, value = (torch.randn(2, heads, keys, 8, generator=source) for _ in range(2))
    mask = torch.rand(2, 1, 6, keys, generator=source) < 0.6
    mask[..., 0] = True
    empty = mask.clone()
    empty[0, 0, 3] = False
    masks = {
        "bool": mask, "float": torch.randn(2, 1, 6, keys, generator=source), "empty": empty,
        "-inf": torch.where(empty, 0.0, -math.inf),
    }  # fmt: skip
    options = {**options, **({"attn_mask": masks[options["attn_mask"]]} if "attn_mask" in options else {})}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    found = attention(query, key, value, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if options.get("attn_mask") is masks["empty"]:
        assert torch.equal(found[0, :, 3], torch.zeros(4, 8))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "falcon", "bert"])
def test_model_with_opened_attention(family):
    program = Pipeline.parse("tag-layers")(aqnfx.trace(build(family, **depth(family, 2))))
    opened = Pipeline.parse("decompose-attention,tag-ops")(program)
    assert not any(site.op is OpKind.SDPA for site in opened.sites)
    inner = [site for site in opened.sites if site.op in (OpKind.SOFTMAX, OpKind.MATMUL)]
    assert len(inner) == 3 * (6 if family == "t5" else 2)
    assert all(site.layer is not None and site.region == "attention" for site in inner)
    for batch, length in ((2, 9), (4, 17)):
        arguments = inputs(family, batch, length)
        with torch.no_grad():
            torch.testing.assert_close(opened(**arguments).logits, program(**arguments).logits, rtol=1e-4, atol=1e-5)
    noisy = Pipeline.parse('insert-noise{where="ops:softmax"}')(opened)
    with torch.no_grad(), noisy.noise(layers=[1], level=0.1):
        assert not torch.equal(noisy(**arguments).logits, opened(**arguments).logits)
    assert sum(noisy.controls.hits().values()) == len([s for s in inner if s.op is OpKind.SOFTMAX]) // 2


@pytest.mark.parametrize(
    ("where", "opened"),
    [("ops:extended", 3), ("layers:1", 1), ("layers:0-1,ops:softmax", 2), ("ops:linear", 0), ("modules:*.0.self_attn", 1),
     ("sites:model.layers.2.self_attn:softmax:0", 1), ("regions:mlp", 0)],
)  # fmt: skip
def test_only_selected_attentions_are_opened(where, opened):
    program = Pipeline.parse("tag-layers")(aqnfx.trace(build("llama")))
    result = Pipeline.parse(f'decompose-attention{{where="{where}"}}')(program)
    assert result.history[-1].op_diff.get("aten.matmul", 0) == 2 * opened
