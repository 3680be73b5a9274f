"""Static structure of graphs small enough to work out by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aqnfx
from aqnfx.errors import InputError
from aqnfx.graph.flops import Sizes, node_flops
from aqnfx.graph.program import Program
from aqnfx.graph.structure import SiteStructure, Structure, structure
from tests.graph.small import Norm, Stack, traced


class Returned(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Diamond(nn.Module):
    r"""
    Two branches of one value that meet again, and a head; a product that is returned beside the logits.

        inp ─┬─ left ── gelu ─┬─ mul ── head
             ├─ right ────────┘
             └─ aside
    """

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.left, self.right, self.aside, self.head = (nn.Linear(4, 4, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Returned:
        h = self.inp(x)
        return Returned(logits=self.head(F.gelu(self.left(h)) * self.right(h)), hidden=self.aside(h))


@pytest.fixture(scope="module")
def diamond() -> Structure:
    return structure(traced(Diamond(), 3, 5, 4))


@pytest.fixture(scope="module")
def stacked() -> Program:
    return traced(Stack(2), 3, 7, 8)


def by_module(found: Structure) -> dict[str, SiteStructure]:
    return {site.module if site.module != "." else site.op: site for site in found.sites}


INP, LEFT, RIGHT, HEAD = (f"{name}:linear:0" for name in ("inp", "left", "right", "head"))
GELU, MEET, ASIDE = ".:gelu:0", ".:glu:0", "aside:linear:0"


def test_dominators_by_hand(diamond: Structure):
    expected = {  # site: (before it, after it)
        INP: ((), (MEET, HEAD)),
        LEFT: ((INP,), (GELU, MEET, HEAD)),
        GELU: ((INP, LEFT), (MEET, HEAD)),
        RIGHT: ((INP,), (MEET, HEAD)),
        MEET: ((INP,), (HEAD,)),
        HEAD: ((INP, MEET), ()),
    }
    for site, (before, after) in expected.items():
        assert (diamond.dominators(site), diamond.post_dominators(site)) == (before, after), site


def test_depth_fan_out_and_single_paths_by_hand(diamond: Structure):
    sites = {site.id: (site.depth, site.fan_out, site.single_path) for site in diamond.sites if site.id != ASIDE}
    assert sites == {
        INP: (0, 3, True), LEFT: (1, 1, False), GELU: (2, 1, False), RIGHT: (1, 1, False), MEET: (3, 1, True),
        HEAD: (4, 0, True),
    }  # fmt: skip
    assert set(diamond.edges) == {
        (INP, LEFT), (INP, RIGHT), (INP, ASIDE), (LEFT, GELU), (GELU, MEET), (RIGHT, MEET), (MEET, HEAD),
    }  # fmt: skip


def test_what_does_not_reach_the_logits(diamond: Structure):
    assert [site.id for site in diamond.sites if not site.reaches_output] == [ASIDE]
    assert diamond.post_dominators(ASIDE) == ()
    assert diamond.dominators(ASIDE) == (INP,)


class Lengths(nn.Module):
    """A value of which only the size is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(x) + torch.arange(h.shape[0]).view(-1, 1, 1)


def test_sizes_are_no_flow():
    found = structure(traced(Lengths(), 3, 5, 4))
    assert {site.module for site in found.sites if site.reaches_output} == {"b", "."}


def test_flops_and_bytes_by_hand(diamond: Structure):
    rows, width, size = 3 * 5, 4, 4
    left = diamond.site(LEFT)
    assert left.flops == 2 * rows * width * width
    assert (left.bytes_read, left.bytes_written) == ((rows * width + width * width) * size, rows * width * size)
    assert left.intensity == left.flops / (left.bytes_read + left.bytes_written)
    assert diamond.site(MEET).bytes_read == 2 * rows * width * size
    assert (diamond.flops, diamond.parameters, diamond.parameter_bytes) == (5 * left.flops, 5 * 16, 5 * 64)


def test_operands_have_the_record_of_their_operation(diamond: Structure):
    assert diamond.site(f"{LEFT}:weight") is diamond.site(LEFT)
    with pytest.raises(InputError, match=r"no site 'lefd:linear:0'; did you mean 'left:linear:0'"):
        diamond.site("lefd:linear:0")


def test_sizes_scale_and_the_bound_follows_the_balance(stacked: Program):
    small = structure(stacked)
    large = structure(stacked, batch=12)
    assert (small.inputs, large.inputs) == ({"x": (3, 7, 8)}, {"x": (12, 7, 8)})
    assert large.flops == 4 * small.flops
    assert {site.bound for site in small.sites} == {"memory"}
    assert {site.bound for site in structure(stacked, balance=1e-3).sites if site.flops} == {"compute"}
    assert large.parameter_bytes == small.parameter_bytes


def test_the_residual_stream(stacked: Program):
    found = structure(stacked)
    places = {site.id: site.residual for site in found.sites if site.layer == "1"}
    # ".1.norm" runs once in each block, before attention; the gated unit reads the stream itself.
    assert {name.removeprefix("blocks.1"): place for name, place in places.items()} == {
        ".norm:rms_norm:0": "read", ".qkv:linear:0": "inside", ":matmul:0": "inside", ":softmax:0": "inside",
        ":matmul:1": "inside", ".out:linear:0": "write", ":add:0": "stream", ".gate:linear:0": "read",
        ":silu:0": "inside", ".up:linear:0": "read", ":glu:0": "inside", ".down:linear:0": "write", ":add:1": "stream",
    }  # fmt: skip
    assert found.site("blocks.1.up:linear:0").merges_at == "blocks.1:add:1"
    assert found.site("inp:linear:0").residual == "stream"
    assert found.site("head:linear:0").residual == "outside"
    assert found.post_dominators("blocks.0.out:linear:0")[:2] == ("blocks.0:add:0", "blocks.0:add:1")
    single = [site.id for site in found.sites if site.single_path]
    assert single == ["inp:linear:0", *(f"blocks.{i}:add:{j}" for i in range(2) for j in range(2)), "head:linear:0"]


class Plain(nn.Module):
    """Additions that are no residual connection: around nothing with a weight, and of two unrelated values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return (h + h.tanh()) + self.b(x)


def test_not_every_addition_is_a_residual_connection():
    assert {site.residual for site in structure(traced(Plain(), 3, 5, 4)).sites} == {"outside"}


class Expanded(nn.Module):
    """One row, read for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.expand(-1, 6, -1))


def test_an_expanded_view_is_read_as_what_it_is_a_view_of():
    (site,) = structure(traced(Expanded(), 3, 1, 4)).sites
    assert (site.bytes_read, site.bytes_written) == ((3 * 4 + 16) * 4, 3 * 6 * 4 * 4)


def test_a_composite_reads_its_input_once():
    found = structure(traced(Norm(8), 3, 7, 8))
    (norm,) = found.sites
    assert (norm.bytes_read, norm.bytes_written, norm.parameters) == ((3 * 7 * 8 + 8) * 4, 3 * 7 * 8 * 4, 8)


def test_inserted_nodes_change_nothing(stacked: Program):
    noisy = aqnfx.Pipeline.parse('insert-noise{where="ops:all"}')(stacked)
    assert structure(noisy).to_record() == structure(stacked).to_record()


class Products(nn.Module):
    """One of each product whose formula is not that of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.turned = nn.ConvTranspose1d(4, 6, 3, stride=2)
        self.w, self.bias = nn.Parameter(torch.ones(4, 9)), nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.transpose(1, 2)
        return (
            self.conv(x), self.turned(x), torch.einsum("btk,kn->btn", rows, self.w),
            torch.addmm(self.bias, rows.reshape(-1, 4), self.w), torch.bmm(rows, x),
            torch.einsum("bt,bk->btk", x[:, 0], x[..., 0]),
        )  # fmt: skip


def test_formulas_of_other_products():
    from torch.utils.flop_counter import FlopCounterMode

    module = Products()
    program = traced(module, 2, 4, 11)
    sizes = Sizes(program, {"x": (2, 4, 11)})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.ones(2, 4, 11))
    expected = [2 * 2 * 6 * 9 * 2 * 3, 2 * 2 * 4 * 11 * 6 * 3, 2 * 22 * 4 * 9, 2 * 22 * 4 * 9, 2 * 2 * 11 * 11 * 4]
    assert [f for node in program.graph.nodes if (f := node_flops(node, sizes))] == expected
    assert sum(expected) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch 0 must be at least 1"), ({"tokens": -1}, "tokens -1 must be at least 1"),
        ({"balance": 0.0}, "balance 0.0 must be a positive"), ({"balance": float("nan")}, "balance nan"),
    ],
)  # fmt: skip
def test_bad_sizes(stacked: Program, options, message):
    with pytest.raises(InputError, match=message):
        structure(stacked, **options)


def test_programs_without_sites_and_fixed_sizes(stacked: Program):
    with pytest.raises(InputError, match="tag-layers,tag-ops first"):
        structure(traced(Stack(1), 3, 7, 8, tags=False))
    with pytest.raises(InputError, match="fixes dimension 1 at 7; 9 was asked"):
        Sizes(stacked, {"x": (3, 9, 8)})
    with pytest.raises(InputError, match="has 3 dimensions"):
        Sizes(stacked, {"x": (3, 9)})
