"""Golden numbers: what a checkout computes, to the last bit, to be compared with what another one computes.

    python tests/tools/golden.py record FILE [SECTION ...]
    python tests/tools/golden.py compare FILE [SECTION ...]

Numbers of CPU kernels differ between machines, so this compares two checkouts on one machine: record at one, compare at the
other. Nothing but the public names and the command line is used, so that code may move in between. ``compare`` names the section
and the entry of every difference and ends with exit code 1 where an entry changed or is gone; what only the newer checkout has is
listed and is no fault. Models beside the checkout (../shared/models) are part of it where they are.
"""

from __future__ import annotations

import os

# Before torch is imported: sums depend on the number of threads.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import contextlib
import hashlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT.parent / "shared" / "models"
# What a run took, where it ran and what it ran on; identities of code rather than of results.
UNSTABLE = frozenset(
    {"provenance", "seconds", "versions", "version", "created", "path", "name_or_path", "peak_memory_mib"}
)
TEXT = [
    "Once upon a time there was a little dog who liked to run in the park with his friends.",
    "Lily saw a big red ball. She wanted to play with it, but it was too high up in the tree.",
    "Tom and his mom went to the store to buy some milk, bread and a small cake for the day.",
    "The bird sang a song in the morning. The sun was warm, and all the flowers were happy.",
    "One day a cat found a blue box under the bed. She opened it and saw a shiny key inside.",
    "Sam was sad because it rained. His sister gave him a book, and they read it by the fire.",
    "There was an old boat on the lake. Ben and Mia sat in it and looked at the little fish.",
    "A frog jumped on a leaf. The leaf went down and the frog got wet, and then he laughed.",
]
Entries = dict[str, str]
SECTIONS: dict[str, Callable[[], Entries]] = {}


def section(function: Callable[[], Entries]) -> Callable[[], Entries]:
    SECTIONS[function.__name__] = function
    return function


class Absent(Exception):
    """What a section needs is not on this machine."""


def hashed(*tensors: Any) -> str:
    """Return a digest of the bits, shapes and dtypes of tensors."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of JSON values with their places; floats as ``repr``, which is all of their bits."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in UNSTABLE:
                yield from flat(part, f"{at}.{key}")
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        for number, part in enumerate(value):
            name = part.get("site") or part.get("id") or number if isinstance(part, dict) else number
            yield from flat(part, f"{at}[{name}]")
    else:
        yield at.removeprefix("."), repr(value).replace(str(MODELS), "MODELS")


def command(*words: str | Path) -> None:
    """Run the command line in this process; what it prints is dropped unless it fails."""
    (main,) = entry_points(group="console_scripts", name="aqnfx")
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    arguments = ["aqnfx", *map(str, words)]
    with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.load()()
        except SystemExit as stop:
            code = stop.code
    if code:
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}: {err.getvalue()[-2000:]}")


def artifact(name: str, *words: str | Path) -> Entries:
    """Return the entries of the JSON file ``name`` that a command writes to --out; ``@`` stands for a file of texts."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT), encoding="utf-8")
        target = Path(folder) / "out"
        out = target / name if words[0] == "plan" else target
        command(*(data if word == "@" else word for word in words), "--out", out)
        return dict(flat(json.loads((target / name).read_text(encoding="utf-8"))))


def model_at(name: str) -> Path:
    found = MODELS / name
    if not found.is_dir():
        raise Absent(f"{found} is absent")
    return found


# Noise ---------------------------------------------------------------------------------------------------------------


@section
def noise_integers() -> Entries:
    import torch

    from aqnfx.numerics.noise import columns, hashes, host_row_keys, row_keys

    found = {}
    for shape, (seed, step, offset), phase in itertools.product(
        [(5,), (4, 3), (4, 3, 7), (6, 2, 3, 5)], [(0, 0, 0), (7, 3, 2), (-5, 2**31 - 1, 1)], (0, 1)
    ):
        key, run = torch.tensor([123456789], dtype=torch.int32), torch.tensor([seed, step, offset], dtype=torch.int32)
        for batch in {0, 1, 2} if len(shape) > 1 else {0}:
            keys = row_keys(shape, batch, key, run, phase)
            bits = hashes(keys.unsqueeze(-1), columns(shape[-1]))
            found[f"{shape} batch {batch} run {seed},{step},{offset} phase {phase}"] = hashed(keys, bits)
            assert torch.equal(host_row_keys(shape, batch, key, run, phase), keys)
    return found


@section
def noise_values() -> Entries:
    import torch

    import aqnfx

    aqnfx.Pipeline.parse("insert-noise")  # registers the operator
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, 32, generator=generator, dtype=torch.float64)
    wide[0, 0, :4] = torch.tensor([0.0, float("inf"), float("nan"), -0.0])
    level, key = torch.tensor([0.1, 0.3]), torch.tensor([987654321], dtype=torch.int32)
    run = torch.tensor([11, 2, 5], dtype=torch.int32)
    found = {}
    kinds = ("relative_gaussian", "rms_gaussian", "absolute_gaussian", "uniform", "bias")
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for kind, dtype, phase, zeros in itertools.product(kinds, dtypes, (0, 1), (False, True)):
        x = wide.to(dtype)
        for batch, channels in ((4, None), (0, torch.linspace(0, 2, 32))):
            y = torch.ops.aqnfx.noise(x, level, key, run, channels, None, batch, kind, -1, phase, zeros, False)
            named = "all channels" if channels is None else "factors"
            found[f"{kind} {dtype} phase {phase} zeros {zeros} batch {batch} {named}"] = hashed(y)
    x = wide.to(torch.float32).clone().requires_grad_()
    torch.ops.aqnfx.noise(x, level, key, run, None, None, 4, kinds[0], -1, 0, False, False).sum().backward()
    found["gradient"] = hashed(x.grad)
    return found


# Graphs --------------------------------------------------------------------------------------------------------------


def sites_of(program: Any, found: Entries, name: str) -> Any:
    import aqnfx

    tagged = aqnfx.Pipeline.parse("tag-layers,tag-ops")(program)
    ids = [site.id for site in tagged.sites]
    found[f"{name} sites"] = f"{len(ids)} {hashlib.sha256(chr(10).join(ids).encode()).hexdigest()[:16]}"
    found[f"{name} layers"] = repr(tagged.layers)
    return tagged


@section
def families() -> Entries:
    import torch

    import aqnfx

    sys.path.insert(0, str(ROOT))
    from tests.families import FAMILIES, build, depth, inputs

    found: Entries = {}
    for name in FAMILIES:
        model = build(name, **depth(name, 2))
        arguments = inputs(name, 2, 13)  # the length that models of one length are traced at
        tagged = sites_of(aqnfx.trace(model), found, name)
        noisy = aqnfx.Pipeline.parse("insert-noise{where='ops:all'}")(tagged)
        with torch.no_grad():
            found[f"{name} clean"] = hashed(tensor_of(noisy(**arguments)))
            with noisy.noise(where="ops:all", level=0.05, seed=3):
                found[f"{name} noise"] = hashed(tensor_of(noisy(**arguments)))
    for extra in ("tinygsm", "babyllama", "stories260k"):
        if extra == "tinygsm" or (MODELS / extra).is_dir():
            sites_of(aqnfx.trace(extra if extra == "tinygsm" else MODELS / extra), found, extra)
    return found


def tensor_of(output: Any) -> Any:
    return next(output[key] for key in ("logits", "last_hidden_state") if key in output)


@section
def formats() -> Entries:
    """What each number format does to weights and inputs of a graph, and to a sum in few bits."""
    import torch

    import aqnfx

    program = aqnfx.Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace("tinygsm"))
    ids = torch.arange(4, 36).reshape(2, 16)
    found = {}
    names = (
        "fp16",
        "bf16",
        "int8",
        "int8:token",
        "int8:g32",
        "int4:g32",
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp8_e4m3",
        "nvfp4",
        "fp8_e4m3",
    )
    passes = [f"insert-fake-quant{{where='ops:linear,roles:weight|input' format={name}}}" for name in names]
    passes += [f"insert-accumulation{{where='ops:linear' element={name}}}" for name in ("bf16", "fp16")]
    for text in passes:
        with torch.no_grad():
            found[text] = hashed(aqnfx.Pipeline.parse(text)(program)(input_ids=ids).logits)
    return found


# Runs ----------------------------------------------------------------------------------------------------------------


@section
def demo() -> Entries:
    """With fewer samples than the demo has, and without a compiler, whose choice goes by timing."""
    return artifact("sensitivity_map.json", "demo", "--compile", "no", "--samples", "4", "--seeds", "1")


def diagnosis(model: str, *options: str) -> Entries:
    fixed = ("--compile", "no", "--samples", "6", "--seeds", "1", "--max-length", "24", "--no-pack")
    return artifact("sensitivity_map.json", "diagnose", model_at(model), "--data", "@", *fixed, *options)


@section
def diagnose_stories260k() -> Entries:
    return diagnosis("stories260k", "--levels", "0.02,0.1", "--draws", "2")


@section
def diagnose_babyllama() -> Entries:
    return diagnosis(
        "babyllama", "--levels", "0.1", "--draws", "2", "--ops", "core", "--layers", "0-2", "--probes", "operator,layer"
    )


@section
def predict_format() -> Entries:
    return diagnosis("stories260k", "--perturb", "mxfp4", "--method", "predict", "--draws", "2")


def planned(*options: str) -> Entries:
    fixed = ("--samples", "4", "--eval-samples", "4", "--draws", "2", "--max-length", "24", "--no-pack")
    return artifact("plan.json", "plan", model_at("stories260k"), "--data", "@", *fixed, *options)


@section
def plan_weights() -> Entries:
    return planned("--formats", "int4:g32,int8:g32", "--partial-groups", "pad", "--avg-bits", "5")


@section
def plan_inputs() -> Entries:
    return planned("--formats", "mxfp4/mxfp4,mxfp8/mxfp8", "--partial-groups", "pad", "--avg-bits", "6")


@section
def scan_weights() -> Entries:
    return artifact("scan.json", "scan", model_at("stories260k"), "--formats", "mxfp4,nvfp4,int8,int4:g32")


@section
def scan_activations() -> Entries:
    fixed = ("--samples", "4", "--max-length", "24", "--compile", "no")
    return artifact("scan.json", "scan", model_at("stories260k"), "--formats", "mxfp4,int8", "--data", "@", *fixed)


# Live ----------------------------------------------------------------------------------------------------------------


@section
def live() -> Entries:
    import torch
    import transformers

    import aqnfx
    from aqnfx.data import embedded_model

    model = transformers.AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32").eval()
    ids = torch.arange(4, 36).reshape(2, 16)
    found = {}
    with aqnfx.instrument(model, inner="eager") as handle:
        handle.set_noise(level=0.1, ops="core", seed=3, step=0)
        with torch.no_grad():
            for step in range(2):
                found[f"logits step {step}"] = hashed(model(ids).logits)
            handle.set_noise(level=0.05, ops="linear", layers=[3, 4], seed=1, step=0)
            found["generated"] = repr(
                model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 16:].tolist()
            )
        handle.set_noise(level=0.05, ops="core", seed=2, step=0, phases="both")
        model(ids, labels=ids).loss.backward()
        found["gradients"] = hashed(*(p.grad for p in model.parameters() if p.grad is not None))
        found["sites"] = hashlib.sha256("\n".join(handle.sites).encode()).hexdigest()[:16]
    return found


# Record and compare --------------------------------------------------------------------------------------------------


def compute(names: list[str]) -> dict[str, Entries]:
    results = {}
    for name in names:
        began, used = time.perf_counter(), time.process_time()
        try:
            results[name] = SECTIONS[name]()
        except Absent as why:
            print(f"{name}: left out, {why}", flush=True)
            continue
        took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - used:.0f} s CPU"
        print(f"{name}: {len(results[name])} entries, {took}", flush=True)
    return results


def differences(expected: dict[str, Entries], found: dict[str, Entries]) -> tuple[list[str], list[str]]:
    """Return what changed or is gone, and what is new, one line each."""
    faults, new = [], []
    for name, entries in found.items():
        before = expected[name]
        for key in dict.fromkeys((*before, *entries)):
            if key not in before:
                new.append(f"{name}: {key} is new: {entries[key][:80]}")
            elif key not in entries:
                faults.append(f"{name}: {key} is gone: {before[key][:80]}")
            elif before[key] != entries[key]:
                faults.append(f"{name}: {key} was {before[key][:80]}, is {entries[key][:80]}")
    return faults, new


def main() -> int:
    usage = f"usage: golden.py record|compare FILE [SECTION ...]; sections: {', '.join(SECTIONS)}"
    words = sys.argv[1:]
    if len(words) < 2 or words[0] not in ("record", "compare") or not set(words[2:]) <= SECTIONS.keys():
        print(usage, file=sys.stderr)
        return 2
    file, names = Path(words[1]), words[2:] or list(SECTIONS)
    import torch

    torch.set_num_threads(1)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if words[0] == "record":
        for name in names:  # what was recorded stays where a later section fails
            known |= compute([name])
            file.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
        return 0
    faults, new = differences(known, compute([name for name in names if name in known]))
    for line in (*new[:40], *faults[:200]):
        print(line)
    print(f"{len(faults)} changed or gone, {len(new)} new")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
