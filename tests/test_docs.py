"""The documentation: its Python blocks run, its links lead somewhere, its tables say what the code says.

After a change of options or passes, ``python tests/test_docs.py`` writes the generated tables anew.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<reason>not run: [^\n]+?) -->\n\n?)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def block(page: str, name: str) -> str:
    """Return what stands between the markers of a generated block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"{page} has no block between <!-- {name} --> and <!-- /{name} -->"
    return found[1]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ("---",) * len(header), *rows])


def flags_table(name: str) -> str:
    """Return the table of a command's arguments, from the command itself."""
    import typer

    from aqnfx.cli.main import app

    command: Any = typer.main.get_command(app)
    rows = []
    for parameter in command.commands[name].params:
        argument = parameter.param_type_name == "argument"
        flag = parameter.name.upper() if argument else " / ".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.required:
            default = "(required)"
        elif parameter.default is None or parameter.default is False:
            default = ""
        else:
            default = f"`{parameter.default}`" if parameter.default is not True else "on"
        rows.append((f"`{flag}`", default, parameter.help.replace("|", "\\|")))
    return table(("Flag", "Default", "Meaning"), rows)


def passes_table() -> str:
    """Return the table of the built-in passes, from the registry and the dataclass fields."""
    from aqnfx.passes.registry import BUILTIN, pass_class

    rows = []
    for name in BUILTIN:
        cls = pass_class(name)
        options = [f"`{f.name}={_default(f.default)}`" for f in dataclasses.fields(cls)]
        what = re.sub(r"``(.+?)``", r"`\1`", " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()))
        needs = ", ".join(f"`{n}`" for n in cls.needs)
        rows.append((f"`{name}`", what, "<br>".join(options), needs))
    return table(("Pass", "What it does", "Options and defaults", "Needs"), rows)


def _default(value: Any) -> str:
    from aqnfx.passes.base import format_option

    return format_option(str(value) if isinstance(value, str) else value)


GENERATED: dict[str, tuple[str, Callable[[], str]]] = {
    "diagnose-flags": ("docs/guide.md", lambda: flags_table("diagnose")),
    "scan-flags": ("docs/formats.md", lambda: flags_table("scan")),
    "export-flags": ("docs/export.md", lambda: flags_table("export")),
    "analyze-flags": ("docs/analysis.md", lambda: flags_table("analyze")),
    "plan-flags": ("docs/planning.md", lambda: flags_table("plan")),
    "passes": ("docs/passes.md", passes_table),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_current(name: str) -> None:
    page, make = GENERATED[name]
    assert block(page, name) == make(), f"{page} is out of date; run: python tests/test_docs.py"


def test_verifier_table_matches_the_rules() -> None:
    from aqnfx.graph.verify import RULES

    names = re.findall(r"^\| `([\w-]+)` \|", block("docs/passes.md", "rules"), re.MULTILINE)
    assert names == list(RULES)


def test_noise_kinds_are_all_described() -> None:
    from aqnfx.numerics.noise import NoiseKind

    names = re.findall(r"^\| `(\w+)` \|", block("docs/noise.md", "kinds"), re.MULTILINE)
    assert names == [str(kind) for kind in NoiseKind]


def test_every_field_of_the_map_is_described() -> None:
    from aqnfx.diagnosis.sensitivity_map import SensitivityMap

    described = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/artifacts.md").read_text("utf-8"), re.MULTILINE))
    missing = {f.name for f in dataclasses.fields(SensitivityMap)} - {"extra"} - described
    assert not missing


def test_every_field_of_a_plan_is_described() -> None:
    from aqnfx.planning.precision_plan import PrecisionPlan

    described = set(re.findall(r"^\| `(\w+)` \|", block("docs/artifacts.md", "plan"), re.MULTILINE))
    assert described == {f.name for f in dataclasses.fields(PrecisionPlan)} | {"schema"}


def test_every_field_of_a_site_of_an_analysis_is_described() -> None:
    from aqnfx.graph.structure import SiteStructure

    described = set(re.findall(r"`(\w+)`", block("docs/artifacts.md", "analysis-sites")))
    assert {f.name for f in dataclasses.fields(SiteStructure)} <= described


def test_every_family_is_listed() -> None:
    from tests.families import FAMILIES

    names = re.findall(r"^\| `(\w+)` \|", block("docs/families.md", "families"), re.MULTILINE)
    assert sorted(names) == sorted(FAMILIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), f"{page.name}: the link {target} leads nowhere"
        if anchor:
            headings = HEADING.findall(FENCE.sub("", other.read_text(encoding="utf-8")))
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {other.name} has no heading #{anchor}"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=() if page.name == "README.md" else pytest.mark.slow) for page in PAGES],
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page run in order, share their names, and may write to the working directory."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem.lower()}"}
    for found in FENCE.finditer(text):
        if found["language"] != "python" or found["reason"]:
            continue
        line = text.count("\n", 0, found.start("code"))
        exec(compile("\n" * line + found["code"], str(page), "exec", dont_inherit=True), namespace)


def test_the_worked_pass_is_that_of_the_example() -> None:
    example = (ROOT / "examples/write_a_pass.py").read_text(encoding="utf-8")
    source = example[example.index("@dataclass") : example.index("\n\n@torch.no_grad()\ndef main")].strip()
    assert source in (ROOT / "docs/passes.md").read_text(encoding="utf-8")


def test_the_worked_pass_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/passes.md says: an installed distribution names the pass, and pipelines know it."""
    from aqnfx.passes.pipeline import Pipeline

    (tmp_path / "silu_passes.py").write_bytes((ROOT / "examples/write_a_pass.py").read_bytes())
    info = tmp_path / "silu_passes-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: silu-passes\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[aqnfx.passes]\nswap-silu = silu_passes:SwapSilu\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        text = 'tag-layers,tag-ops,swap-silu{where="ops:silu,layers:0"}'
        assert str(Pipeline.parse(text)) == text
    finally:
        sys.modules.pop("silu_passes", None)


def write_tables() -> None:
    """Write the generated tables into their pages."""
    for name, (page, make) in GENERATED.items():
        path = ROOT / page
        text, marks = path.read_text(encoding="utf-8"), (f"<!-- {name} -->\n", f"\n<!-- /{name} -->")
        first, rest = text.split(marks[0])
        path.write_text(first + marks[0] + make() + marks[1] + rest.split(marks[1])[1], encoding="utf-8")


if __name__ == "__main__":
    write_tables()
