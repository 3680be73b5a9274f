"""What is shipped, how it is laid out, and which way its imports point."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import aqnfx.passes

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "problems.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}
DATA_LIMIT = 7_000_000  # bytes

# Imports point one way: a module may import from its own rank and from lower ones.
RANKS = {
    "errors": 0,
    "data": 0,
    "artifacts": 1,
    "numerics": 2,
    "ops": 3,
    "graph": 4,
    "passes": 5,
    "probes": 6,
    "live": 7,
    "noisy_ops": 8,
    "scanning": 9,
    "diagnosis": 10,
    "faults": 11,
    "planning": 11,
    "training": 12,
    "export": 13,
    "reporting": 13,
    "cli": 14,
    "__main__": 14,
}


# Layout --------------------------------------------------------------------------------------------------------------


def test_passes_is_a_symlink() -> None:
    link = ROOT / "aqnfx" / "passes"
    assert link.is_symlink(), (
        "aqnfx/passes is not a symbolic link to ../passes. Git checked it out as a file: run "
        "`git config core.symlinks true && rm -rf aqnfx/passes && git checkout -- aqnfx/passes` "
        "(on Windows with developer mode switched on)."
    )
    assert os.readlink(link) == "../passes"


def test_aqnfx_passes_is_the_top_level_directory() -> None:
    assert aqnfx.passes.__file__ is not None
    assert Path(aqnfx.passes.__file__).resolve().parent == ROOT / "passes"


def test_every_package_is_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("aqnfx", "aqnfx/passes")  # glob does not follow the symlink, so it is named
        for init in (ROOT / top).glob("**/__init__.py")
    }
    assert sorted(found) == config["tool"]["setuptools"]["packages"]


def test_embedded_data_is_small_and_readable(tinygsm_path: Path) -> None:
    files = {path.name: path.stat() for path in tinygsm_path.iterdir()}
    assert set(files) == MODEL_FILES
    assert sum(stat.st_size for stat in files.values()) < DATA_LIMIT
    for name, stat in files.items():
        assert stat.st_mode & 0o444 == 0o444, f"{name} is not readable by all"


# The wheel -----------------------------------------------------------------------------------------------------------


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that the checkout gets no build directories."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("aqnfx", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    prefix = "aqnfx/data/tinygsm/"
    assert {name.removeprefix(prefix) for name in sizes if name.startswith(prefix)} == MODEL_FILES
    assert sum(size for name, size in sizes.items() if name.startswith(prefix)) < DATA_LIMIT
    assert "aqnfx/py.typed" in sizes
    assert any(name.endswith("licenses/LICENSE") for name in sizes)
    modules = {name for name in sizes if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for path, _ in library_files()}


@pytest.mark.slow
def test_wheel_installs_and_every_module_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    script = textwrap.dedent(
        """
        import importlib, pkgutil, sys
        from pathlib import Path
        target = sys.argv[1]
        sys.path.insert(0, target)  # before any editable installation, which is found last
        import aqnfx
        names = ["aqnfx"] + [m.name for m in pkgutil.walk_packages(aqnfx.__path__, "aqnfx.")]
        names = [n for n in names if not n.endswith("__main__")]  # importing it would run the program
        for name in names:
            module = importlib.import_module(name)
            assert Path(module.__file__).is_relative_to(target), f"{name} comes from {module.__file__}"
        from aqnfx.data import embedded_model, embedded_problems
        assert embedded_model().is_relative_to(target) and embedded_problems().is_relative_to(target)
        print(*names)
        """
    )
    names = run(sys.executable, "-I", "-c", script, str(target), cwd=tmp_path).split()
    assert {"aqnfx.data", "aqnfx.passes", "aqnfx.graph", "aqnfx.cli"} <= set(names)


def test_data_does_not_import_torch() -> None:
    run(sys.executable, "-c", "import sys, aqnfx.data; assert 'torch' not in sys.modules", cwd=ROOT)


# Source rules --------------------------------------------------------------------------------------------------------


def library_files() -> Iterator[tuple[Path, str]]:
    """Yield every library file under its path in the package, with its module name."""
    for top in ("aqnfx", "aqnfx/passes"):
        for path in sorted((ROOT / top).glob("**/*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            # `from aqnfx import graph` names a sub-package, `from aqnfx.graph.sites import Site` does not.
            yield from ((node.lineno, f"{base}.{alias.name}" if base == "aqnfx" else base) for alias in node.names)


def rank_violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return a line for each import that points to a later rank, or from a module to one without a rank."""
    own = module.split(".")[1]
    found = []
    for line, name in imported_modules(ast.parse(source), module, is_package):
        parts = name.split(".")
        if parts[0] != "aqnfx" or len(parts) == 1:
            continue
        if RANKS.get(parts[1], -1) > RANKS[own]:
            found.append(f"{module}:{line} imports {name}: {own} comes before {parts[1]}")
    return found


def test_imports_point_one_way() -> None:
    found, unranked = [], set()
    for path, module in library_files():
        if module == "aqnfx":
            continue  # the public face may import everything
        if module.split(".")[1] not in RANKS:
            unranked.add(module.split(".")[1])
            continue
        found += rank_violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)
    assert not unranked, f"no rank for {', '.join(sorted(unranked))}: add it to RANKS"


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("aqnfx.graph.sites", "from aqnfx.numerics import noise", 0),
        ("aqnfx.graph.sites", "from aqnfx.passes.base import Pass", 1),
        ("aqnfx.graph.sites", "def f():\n    import aqnfx.probes.measure", 1),
        ("aqnfx.graph.sites", "from aqnfx import cli", 1),
        ("aqnfx.graph.sites", "from ..probes import measure", 1),
        ("aqnfx.cli.main", "from aqnfx import graph, errors", 0),
    ],
)
def test_the_rank_rule_itself(module: str, source: str, count: int) -> None:
    assert len(rank_violations(source, module)) == count


def unsafe_loading(source: str) -> list[str]:
    """Return a line for each way of running code from a file: pickle and its kin, torch.load, trust_remote_code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                bad = [a.name for a in names if a.name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle"}]
                found += [f"line {node.lineno}: import {name}" for name in bad]
            case ast.ImportFrom(module=str(name)) if name.split(".")[0] in {"pickle", "dill", "cloudpickle"}:
                found.append(f"line {node.lineno}: from {name} import")
            case ast.ImportFrom(module="torch", names=names) if any(alias.name == "load" for alias in names):
                found.append(f"line {node.lineno}: from torch import load")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append(f"line {node.lineno}: torch.load")
            case ast.keyword(arg="trust_remote_code", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"line {value.lineno}: trust_remote_code")
    return found


def test_nothing_loads_code_from_files() -> None:
    found = [f"{module} {line}" for path, module in library_files() for line in unsafe_loading(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("from pickle import loads", 1),
        ("import torch\nx = torch.load('f')", 1),
        ("from torch import load", 1),
        ("f(trust_remote_code=True)", 1),
        ("f(trust_remote_code=flag)", 1),
        ("f(trust_remote_code=False)", 0),
        ("import safetensors.torch", 0),
    ],
)
def test_the_loading_rule_itself(source: str, count: int) -> None:
    assert len(unsafe_loading(source)) == count
