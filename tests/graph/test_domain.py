"""A Program knows for which sizes it holds, and says so at every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import aqnfx
from aqnfx.errors import InputError, TraceError
from aqnfx.graph.program import Program


class Chunks(nn.Module):
    """A running sum that is carried from chunk to chunk of eight positions by a loop in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        length = x.shape[1]
        x = nn.functional.pad(x, (0, 0, 0, (8 - length % 8) % 8))
        total, found = x.new_zeros(x.shape[0], 1, 4), []
        for chunk in range(x.shape[1] // 8):
            part = x[:, 8 * chunk : 8 * chunk + 8].cumsum(1) + total
            total = part[:, -1:]
            found.append(part)
        return torch.cat(found, 1)[:, :length]


class Even(nn.Module):
    """Takes another path for lengths that are multiples of four."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 4 == 0 else x * 3


class Twice(nn.Module):
    """Its second input is twice as long as its first."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return torch.cat((x, x), 0) + more[0]


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(length))


def chunked(length: int) -> tuple[nn.Module, Program]:
    model = Chunks().eval()
    return model, aqnfx.trace(model, inputs=((), {"input_ids": ids(3, length)}))


def test_a_loop_over_chunks_is_exact_where_it_is_accepted():
    model, program = chunked(21)
    accepted = []
    for length in range(2, 41):
        try:
            found = program(input_ids=ids(2, length))
        except InputError:
            continue
        accepted.append(length)
        assert torch.equal(found, model(input_ids=ids(2, length)))
    assert 21 in accepted
    assert all(16 < length <= 24 for length in accepted)


def test_outside_the_message_says_what_holds_and_what_to_try():
    _, program = chunked(5)
    with pytest.raises(InputError) as error:
        program(input_ids=ids(2, 30))
    text = str(error.value)
    assert "'input_ids' has 30 in dimension 1" in text
    assert "sizes 1 to 7 there" in text
    assert "sequence_length=30" in text
    assert "\n" not in text
    assert any("holds for sizes 1 to 7" in note for note in program.notes)


def test_passes_keep_the_domain():
    _, program = chunked(5)
    noisy = aqnfx.Pipeline.parse('tag-layers,tag-ops,insert-noise{where="ops:all"}')(program)
    with pytest.raises(InputError, match="sequence_length=30"):
        noisy(input_ids=ids(2, 30))


def test_a_condition_on_remainders():
    program = aqnfx.trace(Even(), inputs=((torch.ones(7, 2),), {}))
    assert torch.equal(program(torch.ones(9, 2)), torch.full((9, 2), 3.0))
    with pytest.raises(InputError, match=r"'x' has 8 in dimension 0; this trace holds for sizes 5 to 7"):
        program(torch.ones(8, 2))


def test_ranges_that_the_caller_gave():
    length = torch.export.Dim("length", min=3, max=16)
    program = aqnfx.trace(nn.ReLU(), inputs=((torch.ones(7, 2),), {}), dynamic_shapes=({0: length},))
    assert program(torch.ones(16, 2)).shape == (16, 2)
    for size in (2, 17):
        with pytest.raises(InputError, match="sizes 3 to 16"):
            program(torch.ones(size, 2))


def test_a_size_that_follows_from_another():
    dynamic = {0: torch.export.Dim.AUTO}
    given = (torch.ones(3, 2), torch.ones(6, 2))
    program = aqnfx.trace(Twice(), inputs=(given, {}), dynamic_shapes=(dynamic, (dynamic,)))
    assert program(torch.ones(5, 2), torch.ones(10, 2)).shape == (10, 2)
    with pytest.raises(InputError):
        program(torch.ones(5, 2), torch.ones(9, 2))


def test_exported_programs_bring_their_guards(tmp_path):
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(Chunks().eval(), (ids(3, 5),), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    torch.export.save(exported, tmp_path / "chunks.pt2")
    program = aqnfx.trace(tmp_path / "chunks.pt2", allow_unsafe_pt2=True)
    assert program(ids(2, 6)).shape == (2, 6, 4)
    with pytest.raises(InputError, match="this trace holds for sizes 1 to 7 there"):
        program(ids(2, 30))


def test_no_limits_no_notes():
    program = aqnfx.trace(nn.Linear(2, 2), inputs=((torch.ones(7, 2),), {}))
    assert program.notes == ()
    assert program(torch.ones(1, 2)).shape == (1, 2)
    assert program.domain is not None
    assert program.domain.limits() == {}


def test_shapes_that_were_in_it_are_looked_up():
    _, program = chunked(5)
    domain = program.domain
    assert domain is not None
    for _ in range(2):
        program(input_ids=ids(2, 6))
    assert len(domain._known) == 1
    object.__setattr__(domain, "_broken", None)  # a known shape evaluates no condition
    program(input_ids=ids(2, 6))


def test_a_guard_that_is_no_expression_of_sizes_is_refused():
    exported = torch.export.export(nn.ReLU(), (torch.ones(3, 2),))
    exported._guards_code = ["__import__('os').getcwd() == L['input'].size()[0]"]
    with pytest.raises(TraceError, match="cannot read the guard"):
        aqnfx.trace(exported)
