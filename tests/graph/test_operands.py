"""Operands as sites: which there are, along which dimensions formats run, what they stay the same under, who is perturbed."""

from __future__ import annotations

import collections
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import SelectorError
from aqnfx.graph.coupling import coupling_groups
from aqnfx.graph.dataflow import dataflow
from aqnfx.graph.operands import PRODUCTS, role_of
from aqnfx.graph.program import Program
from aqnfx.graph.selector import Selector
from aqnfx.graph.sites import OPERANDS, Role
from aqnfx.passes.pipeline import Pipeline
from tests.families import build, depth, inputs
from tests.graph.small import TAGS, generator, seeded, stack
from tests.passes.checks import values

OPEN = "tag-layers,decompose-attention,tag-ops"
EVERY = "|".join(Role)


@functools.cache
def tracing(name: str) -> Program:
    return aqnfx.trace(build(name, **depth(name, 2 if name == "llama" else 1)))


@functools.cache
def prepared(name: str, pipeline: str) -> Program:
    return Pipeline.parse(pipeline)(tracing(name))


def family(name: str, pipeline: str = TAGS) -> Program:
    """Return the tagged program of a family with one block, or two of llama."""
    return prepared(name, pipeline)


def operands(program: Program) -> dict[str, tuple[int, int]]:
    """Return (dimension that is summed over, dimension of the channels) of every operand, by id."""
    return {site: (p.dim, p.channel_dim) for site, p in program.places.items() if p.position is not None}


def tagged(module: nn.Module, *given: Tensor) -> Program:
    return Pipeline.parse(TAGS)(aqnfx.trace(seeded(module), (given, {})))


# Which operands there are ----------------------------------------------------------------------------------------------


class Product(nn.Module):
    """A product that is given as a function of the input and of a parameter."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.empty(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


def transposed_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return torch.convolution(x, weight, None, [1], [0], [1], True, [0], 1)


def plain_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return torch.convolution(x, weight, None, [1], [0], [1], False, [0], 1)


def scores(x: Tensor, p: Tensor) -> Tensor:
    return torch.bmm(F.softmax(torch.bmm(x, (x * p).transpose(1, 2)) * 0.5, -1), x * 2.0)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(6, 5), (3, 6), {".:linear:0:input": (-1, -1), ".:linear:0:weight": (-1, 0)}),
        (nn.Conv1d(6, 5, 3), (3, 6, 9), {".:conv:0:input": (1, 1), ".:conv:0:weight": (1, 0)}),
        (nn.Conv2d(6, 5, 3), (3, 6, 9, 9), {".:conv:0:input": (1, 1), ".:conv:0:weight": (1, 0)}),
        (nn.ConvTranspose1d(6, 5, 3), (3, 6, 9), {".:conv:0:input": (1, 1), ".:conv:0:weight": (0, 1)}),
        (Product(plain_convolution, 5, 6, 3), (3, 6, 9), {".:conv:0:input": (1, 1), ".:conv:0:weight": (1, 0)}),
        (Product(transposed_convolution, 6, 5, 3), (3, 6, 9), {".:conv:0:input": (1, 1), ".:conv:0:weight": (0, 1)}),
        (Product(torch.matmul, 6, 5), (3, 6), {".:linear:0:input": (-1, -1), ".:linear:0:weight": (-2, -1)}),
        (Product(torch.matmul, 6), (3, 6), {".:linear:0:input": (-1, -1), ".:linear:0:weight": (-2, -1)}),
        (
            Product(lambda x, p: torch.addmm(p[0], x, p), 6, 6), (3, 6),
            {".:linear:0:input": (-1, -1), ".:linear:0:weight": (-2, -1)},
        ),
        (
            Product(lambda x, p: torch.bmm(x, (x * p).transpose(1, 2)), 6), (3, 4, 6),
            {".:bmm:0:input": (-1, -1), ".:bmm:0:other": (-2, -1)},
        ),
        (
            Product(lambda x, p: torch.matmul(x * p, x.mT), 6), (3, 6),
            {".:matmul:0:input": (-1, -1), ".:matmul:0:other": (-2, -1)},
        ),
        (
            Product(scores, 6), (3, 4, 6),
            {".:bmm:0:input": (-1, -1), ".:bmm:0:key": (-2, -2), ".:bmm:1:input": (-1, -1), ".:bmm:1:value": (-1, -1)},
        ),
        (Product(lambda x, p: torch.softmax(x * p, -1) + x, 6), (3, 6), {}),
    ],
    ids=["linear", "conv1d", "conv2d", "conv-transpose", "convolution", "convolution-transposed", "parameter", "vector",
         "addmm", "bmm", "matmul", "attention", "no-product"],
)  # fmt: skip
def test_operands_of_small_modules(module, shape, expected):
    program = tagged(module, torch.randn(*shape, generator=generator()))
    assert operands(program) == expected
    assert list(program.places) == [site.id for site in program.all_sites]
    for place in program.places.values():  # an operand stands before its output, and both formats and rows fit it
        value = place.value.meta["val"]
        assert tuple(map(str, place.site.shape)) == tuple(map(str, value.shape))
        assert value.dim() == 1 or max(-place.dim, place.dim + 1, -place.channel_dim, place.channel_dim + 1) <= value.dim()


def test_the_table_of_an_embedding_is_an_operand_and_its_indices_are_not():
    program = tagged(nn.Embedding(7, 6), torch.tensor([[1, 2], [3, 4]]))
    assert operands(program) == {".:embedding:0:weight": (-1, 0)}


LLAMA = {"embedding:weight": 1, "linear:input": 15, "linear:weight": 15}
GPT2 = {"embedding:weight": 2, "linear:input": 5, "linear:weight": 5}
MIXTRAL = {"embedding:weight": 1, "linear:input": 6, "linear:weight": 6, "grouped_mm:input": 2, "grouped_mm:weight": 2}
T5 = {"embedding:weight": 4, "linear:input": 17, "linear:weight": 17}
BERT = {"embedding:weight": 3, "linear:input": 8, "linear:weight": 8}


@pytest.mark.parametrize(
    ("name", "expected", "attentions"),
    [("llama", LLAMA, 2), ("gpt2", GPT2, 1), ("mixtral", MIXTRAL, 1), ("t5", T5, 3), ("bert", BERT, 1)],
)
def test_operands_of_families_with_fused_attention_and_with_open_one(name, expected, attentions):
    fused = {f"sdpa:{role}": attentions for role in ("input", "key", "value")}
    opened = {"matmul:input": 2 * attentions, "matmul:key": attentions, "matmul:value": attentions}
    for pipeline, attention in ((TAGS, fused), (OPEN, opened)):
        program = family(name, pipeline)
        found = collections.Counter(f"{s.op}:{s.role}" for s in program.all_sites if s.role is not Role.OUTPUT)
        assert found == expected | attention
        assert set(program.sites) < set(program.all_sites)
        # What a product sums over is as long in one operand as in the other; values are stored by token, so not theirs.
        for first, second in itertools.pairwise(p for p in program.places.values() if p.position is not None):
            if first.node is second.node and second.site.role in (Role.WEIGHT, Role.KEY, Role.OTHER):
                assert str(first.site.shape[first.dim]) == str(second.site.shape[second.dim]), second.site.id


@pytest.mark.parametrize(
    ("name", "site", "shape", "dims"),
    [
        ("llama", "model.layers.1.mlp.up_proj:linear:0:weight", (64, 32), (-1, 0)),
        ("gpt2", "transformer.h.0.mlp.c_fc:linear:0:weight", (32, 128), (-2, -1)),  # Conv1D: (in, out)
        ("mixtral", "model.layers.0.mlp.experts:grouped_mm:0:weight", (4, 32, 128), (-2, -1)),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k:linear:0:weight", (32, 32), (-1, 0)),
        ("bert", "bert.encoder.layer.0.attention.self.key:linear:0:weight", (32, 32), (-1, 0)),
    ],
)  # fmt: skip
def test_weights_of_families(name, site, shape, dims):
    program = family(name)
    assert program.places[site].site.shape == shape
    assert operands(program)[site] == dims


def test_cross_attention_reads_keys_and_values_of_the_encoder():
    program = family("t5", OPEN)
    lengths = {
        what: program.places[f"{what}:matmul:0:key"].site.shape[-1]
        for what in (
            "encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.0.SelfAttention",
            "decoder.block.0.layer.1.EncDecAttention",
        )
    }  # fmt: skip
    encoder, decoder, crossed = lengths.values()
    assert crossed == encoder != decoder
    assert program.places["decoder.block.0.layer.1.EncDecAttention:matmul:1:value"].site.shape[-2] == encoder


@pytest.mark.parametrize(
    ("site", "opens"),
    [
        ("model.layers.1.self_attn:matmul:0:key", True), ("model.layers.1.self_attn:softmax:0", True),
        ("model.layers.1.self_attn:sdpa:0:key", False), ("model.layers.1.self_attn:sdpa:0", False),
    ],
)  # fmt: skip
def test_an_attention_is_opened_for_what_is_inside_of_it(site, opens):
    program = Pipeline.parse(f'tag-layers,decompose-attention{{where="sites:{site}"}},tag-ops')(tracing("llama"))
    assert site in program.places
    assert ("model.layers.1.self_attn:matmul:0" in program.places) == opens
    assert "model.layers.0.self_attn:sdpa:0" in program.places


@pytest.mark.parametrize("form", ["int4:row", "int4:channel", "int4:g3", "int4:tensor"])
def test_keys_and_values_are_stored_alike_in_fused_and_in_open_attention(form):
    arguments = inputs("llama", 2, 9)

    def stored(pipeline: str, role: str) -> Tensor:
        program = Pipeline.parse(f'insert-fake-quant{{where="layers:0,roles:{role}" format={form}}}')(family("llama", pipeline))
        (node,) = (n for n in program.graph.nodes if n.target is torch.ops.aqnfx.fake_quant.default)
        return values(program, **arguments)[node.name]

    assert torch.equal(stored(TAGS, "key"), stored(OPEN, "key").mT)
    assert torch.equal(stored(TAGS, "value"), stored(OPEN, "value"))


# What a perturbation reaches -------------------------------------------------------------------------------------------


def test_a_perturbed_operand_of_a_tied_weight_leaves_the_other_reader_clean():
    program = Pipeline.parse(TAGS)(aqnfx.trace(build("llama", tie_word_embeddings=True, num_hidden_layers=1)))
    embedding, head = "model.embed_tokens:embedding:0", "lm_head:linear:0"
    assert program.places[f"{embedding}:weight"].value is program.places[f"{head}:weight"].value
    arguments = inputs("llama", 2, 9)
    nodes = program.site_nodes()
    clean = values(program, **arguments)
    for site, embedded in ((f"{head}:weight", False), (f"{embedding}:weight", True)):
        noisy = Pipeline.parse(f'insert-noise{{where="sites:{site}" level=0.1 kind=absolute_gaussian}}')(program)
        found = values(noisy, **arguments)
        assert torch.equal(found[nodes[embedding].name], clean[nodes[embedding].name]) == (not embedded)
        assert torch.equal(found[nodes["lm_head:linear:0"].args[0].name], clean[nodes[head].args[0].name]) == (not embedded)
        assert not torch.equal(found[nodes[head].name], clean[nodes[head].name])
        assert noisy.module.get_parameter("lm_head.weight") is program.module.get_parameter("lm_head.weight")


def test_a_perturbed_input_reaches_one_of_three_readers():
    program = family("llama")
    noisy = Pipeline.parse('insert-noise{where="modules:*.0.self_attn.k_proj,roles:input" level=0.1}')(program)
    clean, found = values(program, **inputs("llama", 2, 9)), values(noisy, **inputs("llama", 2, 9))
    for part, same in (("q", True), ("k", False), ("v", True)):
        name = program.site_nodes()[f"model.layers.0.self_attn.{part}_proj:linear:0"].name
        assert torch.equal(found[name], clean[name]) == same


# What ids stay the same under ------------------------------------------------------------------------------------------


class Capped(nn.Module):
    """Attention written out as gemma2 has it: five operations between the scores and the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.tanh(torch.matmul(q, k.mT) * 0.3 / 2.0) * 2.0
        weights = F.softmax(weights + torch.full_like(weights, float("-inf")).triu(1), -1)
        return self.out(torch.matmul(F.dropout(weights, 0.1, self.training), v))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param('insert-noise{where="ops:all"}', marks=pytest.mark.slow),
        f'insert-fake-quant{{where="ops:all,roles:{EVERY}" format=mxfp4}}',
        f'insert-noise{{where="ops:all"}},insert-fake-quant{{where="ops:all,roles:{"|".join(OPERANDS)}" controls=true}}',
        pytest.param(f'insert-noise{{where="ops:all,roles:{EVERY}"}}', marks=pytest.mark.slow),
    ],
    ids=["noise", "fake-quant", "both", "noise-everywhere"],
)
def test_insertion_and_lowering_leave_ids_dimensions_and_order(spec):
    program = tagged(Capped(), torch.randn(3, 5, 8, generator=generator()))
    roles = [site.role for site in program.all_sites if site.role is not Role.OUTPUT]
    assert roles == [Role.INPUT, Role.WEIGHT, Role.INPUT, Role.KEY, Role.INPUT, Role.VALUE, Role.INPUT, Role.WEIGHT]
    for text in (spec, f"{spec},lower-ops"):
        result = Pipeline.parse(text)(program)
        assert list(result.places) == list(program.places)
        assert operands(result) == operands(program)
        assert [site.to_record() for site in result.all_sites] == [site.to_record() for site in program.all_sites]


def test_strip_restores_the_operands():
    program = stack()
    inserted = Pipeline.parse(f'insert-fake-quant{{where="ops:all,roles:{EVERY}" controls=true}}')(program)
    assert Pipeline.parse("strip")(inserted).fingerprint == program.fingerprint


def test_another_trace_gives_the_same_ids():
    again = Pipeline.parse(OPEN)(aqnfx.trace(build("llama", num_hidden_layers=2), sequence_length=9))
    assert list(again.places) == list(family("llama", OPEN).places)


def test_roles_of_ids():
    program = family("llama", OPEN)
    assert all(role_of(site.id) is site.role for site in program.all_sites)


# Selectors -------------------------------------------------------------------------------------------------------------


def select(text: str, program: Program | None = None) -> list[str]:
    return [site.id for site in (program or family("llama", OPEN)).select(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("roles:input", 19), ("roles:weight", 16), ("roles:key", 2), ("roles:value", 2), ("roles:other", 0),
        ("roles:key|value", 4), ("roles:weight,ops:linear", 15), ("roles:weight,layers:1", 7), ("layers:1,roles:key", 1),
        ("roles:weight,modules:*.q_proj|lm_head", 3), ("roles:weight,ops:softmax", 0), ("roles:input,regions:mlp", 6),
    ],
)  # fmt: skip
def test_what_roles_select(text, expected):
    chosen = select(text)
    assert len(chosen) == expected
    assert all(role_of(site) is not Role.OUTPUT for site in chosen)
    assert chosen == [site.id for site in family("llama", OPEN).all_sites if site.id in chosen]  # execution order


def test_outputs_are_what_is_selected_without_roles():
    program = family("llama", OPEN)
    assert select("ops:all") == select("ops:all,roles:output") == [site.id for site in program.sites]
    assert select(f"ops:all,roles:{EVERY}") == [site.id for site in program.all_sites]
    assert set(select("layers:0-1")).isdisjoint(select("roles:input|weight|key|value"))


def test_auto_is_the_operands_of_products_and_the_outputs_of_everything_else():
    program = family("llama", OPEN)
    expected = [s.id for s in program.all_sites if (s.role is not Role.OUTPUT) == (s.op in PRODUCTS)]
    assert select("ops:all,roles:auto") == expected
    assert "model.layers.0.self_attn:softmax:0" in expected
    assert "model.layers.0.self_attn:matmul:0" not in expected
    assert select("ops:linear,roles:auto") == select("ops:linear,roles:input|weight")
    assert select("ops:silu,roles:auto") == select("ops:silu")
    assert select("roles:auto|output,ops:all") == select(f"roles:{EVERY},ops:all")


def test_an_operand_is_selected_by_its_id_alone():
    assert select("sites:lm_head:linear:0:weight") == ["lm_head:linear:0:weight"]
    assert select("sites:lm_head:linear:0") == ["lm_head:linear:0"]
    assert select("sites:lm_head:linear:0:weight|lm_head:linear:0,roles:output") == ["lm_head:linear:0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roles:wieght", "unknown role 'wieght'; known: output, input, weight, key, value, other, auto; did you mean 'weight'"),
        ("roles:autos", "did you mean 'auto'"),
        ("roles:", "'roles:' names nothing"),
        ("sites:lm_head:linear:0:wieght", "unknown site 'lm_head:linear:0:wieght' among 85; did you mean 'lm_head:linear:0:we"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_said(text, message):
    with pytest.raises(SelectorError, match=message):
        select(text)


def test_text_with_roles_round_trips():
    text = "layers:1,ops:linear,roles:auto|key,sites:a:linear:0:key"
    assert str(Selector.parse(text)) == text


def test_passes_that_take_outputs_only_say_so():
    message = "insert-accumulation: .* also selects 2 operands, first inp:linear:0:weight; this pass takes outputs only"
    with pytest.raises(SelectorError, match=message):
        Pipeline.parse('insert-accumulation{where="modules:inp|head,roles:weight|output"}')(stack(1))


@pytest.mark.slow
def test_ids_stay_under_several_insertions_at_one_site():
    tagged = Pipeline.parse("tag-layers,decompose-attention,tag-ops")(aqnfx.trace(build("qwen2")))
    where = 'where="ops:extended,roles:auto"'
    text = f"insert-noise{{{where}}},insert-capture{{{where} gradients=true}},insert-score{{{where} kind=mxfp4}}"
    assert list(Pipeline.parse(text)(tagged).places) == list(tagged.places)


class Rewritten(torch.nn.Module):
    """Rows of a product that are rewritten in place, one after the other: a chain of moves with two ways through each."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.proj(x) @ x.transpose(-1, -2)
        for row in range(1, 30):
            found[:, row, :row] = found[:, row, :row].clone() * found[:, row - 1, :row].clone()
        return found.softmax(-1) @ x


@pytest.mark.slow
def test_many_updates_in_place_take_linear_time():
    """With a way through every path this would not end: 2²⁹ paths."""
    program = aqnfx.trace(Rewritten().eval(), inputs=((torch.ones(2, 32, 32),), {}))
    tagged = aqnfx.Pipeline.parse("tag-layers,tag-ops")(program)
    assert any(site.op == "softmax" for site in tagged.all_sites)
    assert dataflow(tagged).outputs
    assert coupling_groups(tagged) == ()
