"""Mutants: faults that the tests have to notice. Each is put into a copy of the checkout, and its tests are run there.

    python tests/tools/mutants.py [NAME or AREA ...] [--all] [--record FILE]

A mutant is the only place of the sources where a text stands, what is to stand there, and the names of the test files that
should notice. Files are found by name, texts by themselves, so that code and tests may move. Without names every mutant runs;
``--all`` runs slow tests too, which ``make test`` leaves out. Exit code 1: a mutant survived, or could not be tried. The tests
are run without any fault first, as otherwise everything would look noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("aqnfx", "passes")


@dataclass(frozen=True, slots=True)
class Mutant:
    """``find`` stands once in the sources and becomes ``put``; the test files ``tests`` should notice."""

    area: str
    name: str
    find: str
    put: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant("noise", "phases-alike", "_PHASE_SALT = (0, as_int32(0xA511E9B3))", "_PHASE_SALT = (0, 0)", ("test_noise",)),
    Mutant(
        "noise",
        "host-row-offset",
        "        sample += offset\n",
        "        sample += 0 * offset\n",
        ("test_row_keys", "test_noise"),
    ),
    Mutant("noise", "uniform-variance", "(math.sqrt(3.0) * 2.0**-31)", "(2.0**-31)", ("test_noise",)),
    Mutant(
        "noise",
        "zeros-are-noised",
        "            active = active & (magnitude > 0)\n",
        "            pass\n",
        ("test_noise", "test_selectivity"),
    ),
    Mutant(
        "formats",
        "e4m3-reaches-480",
        "lowest=-6, largest=448.0)",
        "lowest=-6, largest=480.0)",
        ("test_formats", "test_format_oracles"),
    ),
    Mutant(
        "formats",
        "mx-scale-off-by-one",
        "bits = (exponent - (top << 23)).clamp_min_(0)",
        "bits = (exponent - ((top - 1) << 23)).clamp_min_(0)",
        ("test_formats", "test_format_oracles"),
    ),
    Mutant(
        "formats",
        "scale-of-a-short-block-is-free",
        "* -(-width // max(self.block, 1))",
        "* (width // max(self.block, 1))",
        ("test_formats", "test_menu", "test_costs"),
    ),
    Mutant("formats", "zeros-are-dead", "lost.sum() - (x == 0.0).sum()", "lost.sum()", ("test_format_stats",)),
    Mutant(
        "formats",
        "first-sum-is-wide",
        "total = round_element(part if total is None else total + part, short)",
        "total = part if total is None else round_element(total + part, short)",
        ("test_accumulation",),
    ),
    Mutant(
        "passes",
        "backward-always-on",
        'backward = self.level if self.phases != "forward" else 0.0',
        "backward = self.level",
        ("test_passes", "test_selectivity"),
    ),
    Mutant(
        "passes",
        "softmax-zeros-are-noised",
        "keep_zeros = get_tag(origin(places[site.id].value)).op is OpKind.SOFTMAX",
        "keep_zeros = origin is get_tag",
        ("test_selectivity", "test_operands", "test_decompose_attention"),
    ),
    Mutant(
        "passes",
        "mask-the-wrong-way",
        "scores.masked_fill(attn_mask.logical_not(), -math.inf) if masked",
        "scores.masked_fill(attn_mask, -math.inf) if masked",
        ("test_decompose_attention",),
    ),
    Mutant(
        "passes", "strip-does-nothing", "        erase_inserted(program.module)\n", "        pass\n", ("test_passes",)
    ),
    Mutant(
        "passes",
        "ordinals-are-not-shifted",
        "update_tag(node, ordinal=get_tag(node).ordinal + start)",
        "update_tag(node, ordinal=get_tag(node).ordinal)",
        ("test_passes", "test_live"),
    ),
    Mutant(
        "passes",
        "masked-values-take-part-in-scales",
        "masked = site.role is Role.OUTPUT and may_be_infinite(site.op, site.region)",
        "masked = False and may_be_infinite(site.op, site.region)",
        ("test_insert_fake_quant",),
    ),
    Mutant(
        "selector",
        "positions-are-selected",
        'if site.region == "position" and not (',
        'if site.region == "" and not (',
        ("test_selector",),
    ),
    Mutant(
        "selector",
        "last-layer-of-a-range-is-lost",
        '<= site.layer <= int(match["high"] or match["low"])',
        '<= site.layer < int(match["high"] or match["low"])',
        ("test_selector",),
    ),
    Mutant(
        "selector",
        "auto-takes-all-operands",
        "operand == (site.op in PRODUCTS))",
        "operand)",
        ("test_operands", "test_selector"),
    ),
    Mutant(
        "predict",
        "half-is-lost",
        "0.5 * level**2 * self.costs[rows].sum(axis=0)",
        "level**2 * self.costs[rows].sum(axis=0)",
        ("test_predict",),
    ),
    Mutant(
        "predict",
        "stored-twice-counts-twice",
        "{site for site in chosen if self.stored_before.get(site) not in chosen}",
        "set(chosen)",
        ("test_predict_operands", "test_perturb"),
    ),
    Mutant(
        "predict",
        "one-draw-of-many",
        "buffers.sequences[:, :draws, :samples].mean(dim=1)",
        "buffers.sequences[:, :1, :samples].mean(dim=1)",
        ("test_predict", "test_predict_limits"),
    ),
    Mutant(
        "predict",
        "masks-have-gradients",
        "        outside = ~torch.isfinite(y)\n",
        "        outside = torch.isnan(y)\n",
        ("test_predict", "test_predict_limits"),
    ),
    Mutant(
        "measure",
        "samples-in-order-of-batches",
        "    whole.sort(key=lambda b: batches[b].row_offset)\n",
        "",
        ("test_measure", "test_adaptive"),
    ),
    Mutant(
        "measure",
        "late-before-the-first-batch",
        "if batch and time.perf_counter() > self.deadline:",
        "if time.perf_counter() > self.deadline:",
        ("test_adaptive", "test_measure"),
    ),
    Mutant(
        "measure",
        "a-boundary-too-late",
        "start = max(place for place in self._kept if place <= first)",
        "start = max(self._kept)",
        ("test_replay",),
    ),
    Mutant(
        "statistics",
        "holm-is-not-monotone",
        "np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)",
        "np.minimum(p[order] * np.arange(p.size, 0, -1), 1.0)",
        ("test_stats",),
    ),
    Mutant(
        "statistics",
        "ties-count-whole",
        "ndtri(np.clip(below + equal / 2,",
        "ndtri(np.clip(below + equal,",
        ("test_stats",),
    ),
    Mutant(
        "statistics",
        "few-samples-prove-much",
        "return max(found, 2.0 ** (1 - int(np.count_nonzero(weights))))",
        "return found",
        ("test_stats",),
    ),
    Mutant(
        "statistics",
        "superadditive-by-the-estimate",
        '"superadditive": low > 1.0,',
        '"superadditive": high > 1.0,',
        ("test_interpret", "test_estimates"),
    ),
    Mutant(
        "statistics",
        "ranked-upside-down",
        "return -number if np.isfinite(number) else np.inf",
        "return number if np.isfinite(number) else np.inf",
        ("test_interpret",),
    ),
    Mutant(
        "planner", "an-exact-budget-is-refused", "left // shared + 0.5)", "left // shared - 0.5)", ("test_knapsack",)
    ),
    Mutant(
        "planner",
        "the-wrong-estimate-is-believed",
        "weight = prior / (prior + relative)",
        "weight = relative / (prior + relative)",
        ("test_costs", "test_interactions"),
    ),
    Mutant(
        "planner",
        "the-least-sensitive-site-decides",
        "return max(found, key=lambda known: known.value)",
        "return min(found, key=lambda known: known.value)",
        ("test_threshold",),
    ),
    Mutant(
        "planner",
        "exchanges-without-proof",
        "return gain if gain > clear * error else None",
        "return gain",
        ("test_interactions", "test_exchanges"),
    ),
    Mutant(
        "planner",
        "interactions-are-ignored",
        "second = max(additive + believed * cross, 0.0)",
        "second = additive",
        ("test_interactions",),
    ),
    Mutant(
        "export",
        "zero-point-off-by-one",
        "middle = float(1 << (fmt.element.bits - 1))",
        "middle = float((1 << (fmt.element.bits - 1)) - 1)",
        ("test_torchao",),
    ),
    Mutant(
        "export",
        "staging-stays",
        "        yield\n    finally:\n        shutil.rmtree(folder, ignore_errors=True)\n",
        "        yield\n    finally:\n",
        ("test_refusals", "test_torchao"),
    ),
    Mutant(
        "export",
        "short-blocks-go-to-onnx",
        'if fmt.grouping == "block" and width % fmt.block:',
        'if fmt.grouping == "" and width % fmt.block:',
        ("test_refusals", "test_onnx"),
    ),
    Mutant(
        "live",
        "steps-stand-still",
        "            self.step += 1\n",
        "            pass\n",
        ("test_handle", "test_live"),
    ),
    Mutant(
        "live",
        "settings-stay",
        "[one for one in self._settings if one is not setting]",
        "list(self._settings)",
        ("test_handle",),
    ),
    Mutant(
        "live",
        "masks-of-another-width",
        "if known is not None and known.shape != value.shape:",
        "if False:",
        ("test_handle", "test_live", "test_noisy_ops"),
    ),
    Mutant(
        "journal", "any-run-continues", "if found.get(key) != wanted[key]:", "if key not in wanted:", ("test_journal",)
    ),
    Mutant(
        "journal",
        "damage-is-believed",
        "hashlib.sha256(body).hexdigest()[:16].encode() != digest:",
        "not digest:",
        ("test_journal",),
    ),
    Mutant(
        "journal",
        "two-runs-write",
        "fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ("test_journal",),
    ),
    Mutant(
        "scan",
        "only-padding-counts",
        "rows[~dropped_rows(mask, x, len(rows)).squeeze(1)]",
        "rows[dropped_rows(mask, x, len(rows)).squeeze(1)]",
        ("test_activation_scan", "test_scan"),
    ),
    Mutant("scan", "variance-about-zero", "variance = two - one * one", "variance = two", ("test_format_stats",)),
    Mutant(
        "functional",
        "later-readers-see-the-change",
        "and all(user < node for user in readers)",
        "",
        ("test_functional",),
    ),
    Mutant(
        "functional",
        "a-view-is-changed",
        "if _may_alias(source) and source not in fresh:",
        "if False:",
        ("test_functional",),
    ),
    Mutant(
        "cli",
        "wrong-exit-code",
        "interrupted = Code.TERMINATED if terminated else Code.INTERRUPTED",
        "interrupted = Code.TERMINATED",
        ("test_interrupt",),
    ),
    Mutant(
        "cli",
        "journal-stays",
        "if not smap.partial:  # before anything is printed",
        "if smap.partial:  # before anything is printed",
        ("test_commands", "test_interrupt"),
    ),
)


def sources(root: Path) -> Iterator[Path]:
    for top in SOURCES:
        yield from sorted((root / top).glob("**/*.py"))


def place_of(mutant: Mutant, root: Path) -> Path:
    """Return the file that a mutant is of; raise :class:`LookupError` where its text does not stand once."""
    found = []
    for path in {path.resolve() for path in sources(root)}:
        found += [path] * path.read_text(encoding="utf-8").count(mutant.find)
    if len(found) != 1:
        raise LookupError(f"{mutant.name}: {mutant.find!r} stands {len(found)} times in the sources; it must be once")
    return found[0]


def files_of(mutant: Mutant, root: Path) -> list[str]:
    """Return the test files that should notice; a name that several folders have stands for all of them."""
    found = [path for name in mutant.tests for path in sorted((root / "tests").glob(f"**/{name}.py"))]
    if not found:
        raise LookupError(f"{mutant.name}: there is no test file {', '.join(mutant.tests)}")
    return [str(path.relative_to(root)) for path in found]


def copy_tree(parent: Path) -> Path:
    """Copy what git knows or would take of the checkout, and link the models beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    root = parent / "checkout"
    for name in filter(None, listed.stdout.split("\0")):
        if not (source := ROOT / name).exists():
            continue  # removed, not committed yet
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    if (ROOT.parent / "shared").is_dir():
        (parent / "shared").symlink_to(ROOT.parent / "shared")
    return root


def run_tests(root: Path, files: Sequence[str], slow: bool) -> tuple[int, str]:
    """Run test files until the first failure; return the exit code and the last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        [*command, *([] if slow else ["-m", "not slow"])],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def verdict(mutant: Mutant, root: Path, slow: bool) -> tuple[str, str]:
    """Return "killed", "survived" or "broken" of a mutant in the copy at ``root``, and a line of why."""
    try:
        path, files = place_of(mutant, root), files_of(mutant, root)
    except LookupError as error:
        return "broken", str(error)
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.find, mutant.put), encoding="utf-8")
    try:
        code, said = run_tests(root, files, slow)
    finally:
        path.write_text(before, encoding="utf-8")
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    if code == 1 and failed:
        return "killed", failed[0].removeprefix("FAILED ").split(" - ")[0]
    return ("survived", ", ".join(files)) if code == 0 else ("broken", said)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants or areas; default: all")
    parser.add_argument("--all", action="store_true", help="slow tests too")
    parser.add_argument("--record", type=Path, help="JSON file that verdicts are added to")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a fault first")
    asked = parser.parse_args()
    known = {word for mutant in MUTANTS for word in (mutant.name, mutant.area)}
    if unknown := set(asked.names) - known:
        parser.error(f"no mutant or area is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not asked.names or {m.name, m.area} & set(asked.names)]
    with tempfile.TemporaryDirectory() as parent:
        root = copy_tree(Path(parent))
        if not asked.unchecked:
            files = sorted({file for mutant in chosen for file in files_of(mutant, root)})
            code, said = run_tests(root, files, asked.all)
            if code:
                print(f"the tests fail without any fault:\n{said}")
                return 1
        counts: dict[str, int] = {}
        for mutant in chosen:
            began = time.perf_counter()
            found, why = verdict(mutant, root, asked.all)
            counts[found] = counts.get(found, 0) + 1
            print(f"{found:8} {mutant.area}/{mutant.name} ({time.perf_counter() - began:.0f} s): {why}", flush=True)
            if asked.record is not None:
                record = json.loads(asked.record.read_text(encoding="utf-8")) if asked.record.exists() else {}
                record[mutant.name] = [found, why]
                asked.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    return 0 if counts.keys() <= {"killed"} else 1


if __name__ == "__main__":
    sys.exit(main())
