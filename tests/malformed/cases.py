"""Malformed inputs by number: what is typed, what files hold, what the file system says. The same numbers on every machine.

``CASES[n]`` is tried by ``pytest "tests/malformed/test_malformed.py::test_malformed[n]"``; what stands for places: ``{model}``
(a good model), ``{data}``, ``{map}``, ``{plan}`` (good files), ``{here}`` (the case's own folder) and ``{out}`` (inside of it).
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Setup = Callable[[Path, "Good"], None]


@dataclass(frozen=True, kw_only=True)
class Good:
    """What is well-formed: a model's folder, data, and the records of a map and a plan."""

    model: Path
    data: Path
    map: dict[str, Any]
    plan: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One malformed input: what is typed, and what makes the files of its own folder.

    ``may_pass``: what was changed at random may still be well-formed.
    """

    arguments: tuple[str, ...]
    setup: Setup | None = None
    may_pass: bool = False


DIAGNOSE = ("diagnose", "{model}", "--data", "{data}", "--out", "{out}", "--compile", "no", "--samples", "2", "--seeds", "1",
            "--levels", "0.1", "--max-length", "24", "--ops", "linear", "--method", "measure",
            "--probes", "operator")  # fmt: skip
PLAN = ("plan", "{model}", "--data", "{data}", "--out", "{out}/plan.json", "--avg-bits", "5", "--samples", "1",
        "--eval-samples", "0", "--max-length", "16")  # fmt: skip
BY_MAP = ("plan", "{model}", "--rule", "threshold", "--out", "{out}/plan.json")
SCAN = ("scan", "{model}", "--out", "{out}")
ANALYZE = ("analyze", "{model}", "--out", "{out}", "--tokens", "8")
EXPORT = ("export", "{plan}", "--out", "{out}", "--to", "modelopt")
OPT = ("opt", "{model}", "--out", "{out}/graph.txt")

LONG = "x" * 300
NUMBERS = ("-1", "0x10", "1e3", "nan", "", "99999999999999999999", "9" * 400, "1.5.2", "\x1b[31m7", "[red]3")
REALS = ("nan", "inf", "-1", "1e400", "", "1,2", "abc", "\x1b[2J")
WORDS = ("", "nope", "[red]x[/red]", "\x1b[31mx", "a" * 3000, "é€🙂", "../..", "{x}")
PATHS = ("nowhere.json", "/dev/zero", "/dev/full", LONG, "{here}", "{data}/below", "", "\x1b]0;x")
OUTPUTS = ("{data}", "{data}/below", LONG, f"{{here}}/{LONG}", "/dev/full/x", "/proc/nowhere/x")


def options() -> Iterator[Case]:
    """Yield options that cannot be meant, one at a time after well-formed ones."""
    counts = {
        DIAGNOSE: ("--samples", "--seeds", "--batch-size", "--window", "--step", "--draws", "--max-length", "--workers"),
        PLAN: ("--samples", "--batch-size", "--draws", "--pareto", "--eval-samples", "--max-length"),
        SCAN: ("--samples", "--batch-size", "--max-length"),
        ANALYZE: ("--batch", "--tokens", "--top"),
    }
    reals = {
        DIAGNOSE: ("--levels", "--base-level", "--outlier-threshold"),
        PLAN: ("--avg-bits", "--kv-bits", "--seconds", "--max-kl"),
        ANALYZE: ("--balance",),
    }
    words = {
        DIAGNOSE: ("--ops", "--layers", "--task", "--noise", "--perturb", "--roles", "--probes", "--method", "--metric",
                   "--compile", "--replay-memory", "--device", "--dtype", "--budget", "--executor", "--text-field"),
        PLAN: ("--formats", "--rule", "--thresholds", "--bytes", "--kv-formats", "--modules", "--layers", "--keep", "--floor",
               "--couple", "--partial-groups", "--device", "--dtype", "--text-field"),
        SCAN: ("--formats",),
        EXPORT: ("--to", "--dtype"),
        OPT: ("--pipeline",),
    }  # fmt: skip
    paths = {
        DIAGNOSE: ("--data", "--config"), PLAN: ("--data", "--map", "--latency-table"), BY_MAP: ("--map",), SCAN: ("--data",),
        ANALYZE: ("--map",),
    }  # fmt: skip
    outputs: dict[tuple[str, ...], tuple[str, ...]] = dict.fromkeys((DIAGNOSE, PLAN, SCAN, ANALYZE, EXPORT, OPT), ("--out",))
    for table, values in ((counts, NUMBERS), (reals, REALS), (words, WORDS), (paths, PATHS), (outputs, OUTPUTS)):
        for command, names in table.items():
            for name in names:
                for value in values:
                    if (name, value) not in MEANT and (command, value) not in ((EXPORT, "{data}"), (OPT, "{data}")):
                        yield Case(arguments=(*command, name, value))


MEANT = {
    ("--layers", ""), ("--text-field", ""), ("--modules", ""), ("--layers", ""), ("--probes", ""), ("--levels", "inf"),
    ("--data", "/dev/full"), ("--replay-memory", ""), ("--pipeline", ""), ("--budget", ""), ("--balance", "-1"),
    ("--top", NUMBERS[5]), ("--top", NUMBERS[6]), ("--levels", "1,2"), ("--roles", ""),
}  # fmt: skip
"""Options and values that mean something, or the same as another case."""

YAML = (
    "", "3", "- 1", "a: [", "\t", "a: *x", "!!python/object:os.system x", "samples: 2001-02-03", "levels: !!int abc", "? [a]: b",
    "samples: true", "samples: yes", "seeds: 1.5", "seeds: [1, 2]", "levels: {a: 1}", "levels: [[1]]", "levels: [null]",
    "levels: 2001-02-03", "window: {}", "window: '3 4'", "ops: [[x]]", "ops: {linear: 1}", "out: [a]", "out: {a: b}", "pack: 7",
    "pack: [true]", "compile: [yes]", "compile: 3", "device: [cpu]", "dtype: 32", "budget: {}", "budget: -1", "stop: {a: 1}",
    "stop: 3", "stop: [1]", "stop: [a]", "samples: 99999999999999999999", "seed: 1e400", "seed: .inf", "seed: .nan", "seed: x",
    "levels: .nan", "levels: [.inf]", "base_level: [0.1]", "text-field: [a]", "data: [a]", "model: x", "config: y", "json: 3",
    "json_output: maybe", "resume: [1]", "probes: {operator: 1}", "executor: [ray]", "workers: -3", "replay_memory: -1",
    "replay_memory: 9999999999999999999999GiB", "outlier_threshold: x", "metric: 3", "task: [kl]", "layers: {0: 1}", "draws: ''",
    "? !!binary x\n: y", "samples: !!float x", "samples: !!timestamp x", "levels: !!set {a}", "{[a]: b}", "a: !foo b",
    "x: &a [*a]", "levels: &a [*a, *a]", "samples: 0o", "--- \n---\n", "%YAML 9.9\n---\na: b", "\x00", "samples: \x01",
    "[" * 5000, "{a: " * 2000, "samples: " + "9" * 5000, "noise: \"\\ud800\"", "noise: \"\\x1b[31m\"", "ops: \"\\0\"",
    "out: \"\\0\"",
    "data: \"\\0\"", "data: \"\\ud800\"", "out: \"\\ud800\"", "noise: " + "x" * 100000,
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "levels: [*f,*f,*f,*f,*f,*f,*f,*f,*f]",
)  # fmt: skip


def configurations() -> Iterator[Case]:
    """Yield YAML files for --config; a good one would go on to a model that is not there."""
    for text in YAML:

        def setup(here: Path, _good: Good, text: str = text) -> None:
            (here / "config.yaml").write_bytes(text.encode("utf-8"))

        yield Case(
            arguments=("diagnose", "{here}/nowhere", "--data", "{data}", "--out", "{out}", "--config", "{here}/config.yaml"),
            setup=setup,
        )


RAW: tuple[bytes, ...] = (
    b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}", b'{"schema": 3}', b"[" * 100000, b'{"a":' * 50000,
    b'{"schema": "aqnfx.plan/1"}', b'{"schema": "aqnfx.sensitivity/1"}', b'{"schema": "aqnfx.divergences/1"}', b"NaN",
    b'{"*": {"int8:row": ' + b"9" * 5000 + b"}}", b'{"*": {"int8:row": 1e999}}', b'{"*": 3}', b'{"*": {"nope": 1}}',
    b'{"*": {"int8:row": -1}}', b'{"*": {"int8:row": true}}', b'{"\\ud800": {"int8:row": 1}}', b'{"\\u001b[31m": 3}',
    b'{"schema": "aqnfx.divergences/1", "sites": {}}', b'{"schema": "aqnfx.divergences/1", "sites": {"0": 1e999}}',
    b'{"schema": "aqnfx.divergences/1", "sites": {"0": "1"}}', b'{"schema": "aqnfx.divergences/1", "sites": [1]}',
    b'{"schema": "aqnfx.divergences/1", "sites": {"\\u001b[31m": 1}}', b'{"schema": "\\u001b[31m\\n\\n"}', b"\x00" * 100,
)  # fmt: skip


def artifacts() -> Iterator[Case]:
    """Yield files that are no JSON, or no such record, in every place that reads one."""
    readers = (
        (*ANALYZE, "--map", "{here}/a.json"), (*BY_MAP, "--map", "{here}/a.json"),
        ("plan", "{model}", "--migration", "--map", "{map}", "--divergences", "{here}/a.json", "--out", "{out}/m.json"),
        (*PLAN[:6], "--seconds", "1", "--latency-table", "{here}/a.json"),
        ("export", "{here}/a.json", "--out", "{out}", "--to", "modelopt", "--no-check"),  # reading back takes a process
    )  # fmt: skip
    for arguments in readers:
        for raw in RAW:

            def setup(here: Path, _good: Good, raw: bytes = raw) -> None:
                (here / "a.json").write_bytes(raw)

            yield Case(arguments=arguments, setup=setup)


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**25, 1e308, "", "x", "\x1b[31m[red]", [], {}, [None], {"a": None}, [[]], [-1], ["x", 1], "a" * 5000,
    {"x": {"y": []}}, "\ud800",
)  # fmt: skip


def mutated(record: Any, rng: random.Random) -> Any:
    """Return the record with one value somewhere in it replaced, or gone."""
    made = copy.deepcopy(record)
    place, key = made, rng.choice(list(made))
    while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.75:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    if rng.random() < 0.15:
        del place[key]
    else:
        place[key] = copy.deepcopy(rng.choice(VALUES))
    return made


def mutations(first: int, last: int) -> Iterator[Case]:
    """Yield maps, plans and model configurations with one value changed at random."""

    def changed(which: str, seed: int) -> Setup:
        def setup(here: Path, good: Good) -> None:
            record = {"map": good.map, "plan": good.plan}[which]
            (here / "a.json").write_text(json.dumps(mutated(record, random.Random(seed))), encoding="utf-8")

        return setup

    for seed in range(first, last):
        yield Case(arguments=("export", "{here}/a.json", *EXPORT[2:]), setup=changed("plan", seed), may_pass=True)
    for seed in range(first, last):
        yield Case(arguments=(*ANALYZE, "--map", "{here}/a.json"), setup=changed("map", seed), may_pass=True)
    for seed in range(first, last):
        yield Case(arguments=(*BY_MAP, "--map", "{here}/a.json"), setup=changed("map", seed), may_pass=True)


def places() -> Iterator[Case]:
    """Yield states of the file system: links, pipes, folders and files where others belong."""

    def journal(content: bytes) -> Setup:
        def setup(here: Path, _good: Good) -> None:
            (here / "out").mkdir()
            (here / "out" / "journal.jsonl").write_bytes(content)

        return setup

    for content in (b"", b"x", b"{}\n", b"\x00" * 999, b"0123456789abcdef {}\n{}\n"):
        yield Case(arguments=DIAGNOSE, setup=journal(content))
        if content:
            yield Case(arguments=(*DIAGNOSE, "--resume"), setup=journal(content))

    def odd(make: Callable[[Path], object], name: str) -> Setup:
        def setup(here: Path, _good: Good) -> None:
            (here / "out").mkdir()
            make(here / "out" / name)

        return setup

    written = {
        DIAGNOSE: ("sensitivity_map.json", "report.json", "report.md", "journal.jsonl"), SCAN: ("scan.json", "scan.md"),
        ANALYZE: ("analysis.json", "analysis.svg"), PLAN: ("plan.json", "plan.md"), OPT: ("graph.txt",),
    }  # fmt: skip
    kinds: tuple[Callable[[Path], object], ...] = (
        lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/full"), lambda path: path.symlink_to(path),
    )  # fmt: skip
    for command, names in written.items():
        for name in names:
            for make in kinds:
                yield Case(arguments=command, setup=odd(make, name))
    for make in kinds:

        def setup(here: Path, _good: Good, make: Callable[[Path], object] = make) -> None:
            make(here / "a")

        for arguments in (
            (*DIAGNOSE, "--data", "{here}/a"), (*DIAGNOSE, "--config", "{here}/a"), (*ANALYZE, "--map", "{here}/a"),
            ("export", "{here}/a", "--out", "{out}", "--to", "modelopt"), ("trace", "{here}/a"), ("scan", "{here}/a"),
        ):  # fmt: skip
            yield Case(arguments=arguments, setup=setup)
    for arguments in (
        (*PLAN, "--out", "{data}"), (*PLAN, "--out", "{model}/config.json"), (*OPT, "--out", "{model}/config.json"),
        ("export", "{plan}", "--out", "{plan}", "--to", "modelopt"), (*BY_MAP, "--map", "{map}", "--out", "{map}"),
        ("trace", LONG), ("trace", f"{{here}}/{LONG}"), ("trace", ""), ("trace", "/dev/zero"), ("trace", "{data}"),
        ("scan", LONG),
        ("analyze", "\x1b[31m"), ("diagnose",), ("plan",), ("nope",), ("--nope",), ("env", "x"), ("demo", "--samples", "-1"),
        ("demo", "--seeds", "0", "--out", "{out}"), ("demo", "--out", "{data}"), ("demo", "--compile", "x", "--out", "{out}"),
    ):  # fmt: skip
        yield Case(arguments=arguments)


DATA: tuple[bytes, ...] = (
    b"", b"\n\n\n", b"\xff\xfe\x00", b"{", b"[]", b"3\n4\n", b"null\n", b'{"text": 3}\n', b'{"text": null}\n', b'{"text": ""}\n',
    b'{"text": "   "}\n', b'{"text": ["a"]}\n', b'{"text": {"a": 1}}\n', b'{"body": "x"}\n', b'{"text": "fine"}\n{"text": \n',
    b'{"text": "fine"}\n3\n', b"[" * 100000, b'{"text": ' * 50000, b'{"text": ' + b"9" * 5000 + b"}\n", b'{"question": "a"}\n',
    b'{"answer": "a"}\n', b'{"question": 3, "answer": []}\n', b'{"text": NaN}\n', b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1",
)  # fmt: skip


def data_files() -> Iterator[Case]:
    """Yield data that are none, under names that promise JSON lines and parquet."""
    for raw in DATA:
        for name in ("a.jsonl", "a.parquet"):

            def setup(here: Path, _good: Good, raw: bytes = raw, name: str = name) -> None:
                (here / name).write_bytes(raw)

            yield Case(arguments=(*DIAGNOSE, "--data", f"{{here}}/{name}"), setup=setup)


CONFIG: tuple[dict[str, Any], ...] = (
    {"hidden_size": -1}, {"hidden_size": "x"}, {"hidden_size": 10**9}, {"hidden_size": None}, {"num_hidden_layers": 10**6},
    {"num_hidden_layers": -3}, {"num_hidden_layers": 7}, {"num_hidden_layers": 1.5}, {"num_attention_heads": 0},
    {"num_attention_heads": 7}, {"vocab_size": 10**12}, {"vocab_size": 1}, {"model_type": "nope"}, {"model_type": 3},
    {"model_type": None}, {"architectures": ["Nope"]}, {"architectures": [3]}, {"architectures": ["AutoTokenizer"]},
    {"architectures": ["\u001b[31mGPT"]}, {"hidden_act": "nope"}, {"hidden_act": 3}, {"quantization_config": 3},
    {"quantization_config": {"quant_method": "x"}}, {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
    {"rope_parameters": {"rope_type": "x"}},
)  # fmt: skip
WEIGHTS: tuple[bytes, ...] = (
    b"", b"x", b"\x00" * 8, b"\xff" * 16, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
)  # fmt: skip


def models() -> Iterator[Case]:
    """Yield models whose configuration is changed or whose weights are none."""

    def changed(name: str, content: Callable[[bytes], bytes]) -> Setup:
        def setup(here: Path, good: Good) -> None:
            shutil.copytree(good.model, here / "model")
            (here / "model" / name).write_bytes(content((good.model / name).read_bytes()))

        return setup

    made = [changed("config.json", lambda old, new=new: json.dumps(json.loads(old) | new).encode()) for new in CONFIG]  # type: ignore[misc]
    made += [changed("config.json", lambda _old, raw=raw: raw) for raw in RAW[:12]]  # type: ignore[misc]
    made += [changed("model.safetensors", lambda _old, raw=raw: raw) for raw in WEIGHTS]  # type: ignore[misc]
    made += [changed("model.safetensors", lambda old, n=n: old[:n]) for n in (7, 9, 500, -1)]  # type: ignore[misc]
    for index, setup in enumerate(made):
        for arguments in (("trace", "{here}/model"), ("scan", "{here}/model", "--out", "{out}")):
            # A scan reads weights alone; attention and activations of a configuration are nothing to it.
            yield Case(arguments=arguments, setup=setup, may_pass=arguments[0] == "scan" and index < len(CONFIG) + 12)


FAST_MUTATIONS, MUTATIONS = 15, 100
FAST: tuple[Case, ...] = (
    *options(), *configurations(), *artifacts(), *places(), *data_files(), *models(), *mutations(0, FAST_MUTATIONS),
)  # fmt: skip
CASES: tuple[Case, ...] = (*FAST, *mutations(FAST_MUTATIONS, MUTATIONS))
