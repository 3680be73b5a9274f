"""The mutants of ``tests/tools/mutants.py`` can be made: the text that each changes stands once, and its tests exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.mutants import MUTANTS, Mutant, files_of, place_of

AREAS = {
    "noise", "formats", "passes", "selector", "predict", "measure", "statistics", "planner", "export", "live", "journal", "scan",
    "functional", "cli",
}  # fmt: skip


def test_there_are_mutants_of_every_area() -> None:
    assert len(MUTANTS) >= 30
    assert {mutant.area for mutant in MUTANTS} == AREAS
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant: Mutant, repo_root: Path) -> None:
    assert place_of(mutant, repo_root).is_file()
    assert files_of(mutant, repo_root)
    assert mutant.find != mutant.put
