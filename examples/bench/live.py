"""Live models: tokens per second of generation and of training steps, side by side, and whether level 0 changes anything.

    python examples/bench/live.py MODEL [MODEL ...] [--inner inductor,eager] [--rounds 7] [--part speed,agreement,memory]
                                  [--quick] [--out FILE]

MODEL is a Hugging Face directory; for the agreement also a family of tests/families.py. The file grows: runs of the same sizes
add up. Contenders: the model compiled by torch.compile, instrumented at level 0, instrumented with noise at all core operators,
and noise as hook-based tools make it: autograd functions in place of torch.nn.functional.linear and torch.matmul, and hooks that
say which layer runs. "agreement" compares logits, gradients and greedy generations with those of the compiled model without
instrumentation, by both caches and with left padding, and noise with that of the eager backend; "memory" trains 200 steps with
noise on values and gradients.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, finish, interleaved, machine, ratio
from torch import Tensor, nn

from aqnfx.live.instrument import Handle, instrument

LEVEL = 0.01
NEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is run: rounds, prompts and their length, training batch and its length."""

    rounds: int = 7
    prompts: int = 4
    prompt: int = 32
    batch: int = 8
    length: int = 128
    new: int = NEW_TOKENS
    steps: int = 200


QUICK = Sizes(rounds=1, prompts=2, prompt=8, batch=2, length=16, new=4, steps=6)


class _Noisy(torch.autograd.Function):
    """What hook-based tools put in place of a product: its noise on the value, and on the gradients of both operands."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, product: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.product = product
        y = product(a, b)
        return y + LEVEL * y.abs() * torch.randn_like(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b = ctx.saved_tensors
        first = ctx.product(grad, b.transpose(-1, -2))
        second = ctx.product(a.flatten(0, -2).t() if b.dim() == 2 else a.transpose(-1, -2),
                             grad.flatten(0, -2) if b.dim() == 2 else grad)  # fmt: skip
        return (*(g + LEVEL * g.abs() * torch.randn_like(g) for g in (first, second)), None)


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    """Products are noisy, and hooks keep the number of the layer that runs, as such tools count by."""
    linear, matmul = nn.functional.linear, torch.matmul
    current: list[int | None] = [None]
    counts: dict[int | None, int] = {}

    def noisy(a: Tensor, b: Tensor) -> Tensor:
        counts[current[0]] = counts.get(current[0], 0) + 1
        return _Noisy.apply(a, b, matmul)  # type: ignore[no-untyped-call]

    def noisy_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = noisy(x, weight.t())
        return y if bias is None else y + bias

    def enters(number: int) -> Callable[..., None]:
        return lambda *_: current.__setitem__(0, number)

    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    handles = [layer.register_forward_pre_hook(enters(number)) for number, layer in enumerate(layers)]
    nn.functional.linear, torch.matmul = noisy_linear, noisy  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear, torch.matmul = linear, matmul
        for handle in handles:
            handle.remove()


def load(model: str) -> nn.Module:
    made: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return made.eval()


def tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, int(model.config.vocab_size), (rows, length), generator=generator)  # type: ignore[union-attr,arg-type]


def generation(model: nn.Module, sizes: Sizes) -> Callable[[], Any]:
    ids = tokens(model, sizes.prompts, sizes.prompt)
    options = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]


def training(model: nn.Module, sizes: Sizes) -> Callable[[], Any]:
    ids = tokens(model, sizes.batch, sizes.length, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


def speed(name: str, inner: str, sizes: Sizes) -> dict[str, Any]:
    """Return tokens per second and ratios of all contenders, for generation and for training steps."""
    found: dict[str, Any] = {}
    for task, make in (("generation", generation), ("training", training)):
        models = {kind: load(name) for kind in ("clean", "level 0", "noise", "hooks")}
        calls = {kind: make(model, sizes) for kind, model in models.items()}
        models["clean"].compile(backend=inner)
        handles = [instrument(models[kind], inner=inner) for kind in ("level 0", "noise")]
        handles[1].set_noise(level=LEVEL, ops="core", phases="both" if task == "training" else "forward", seed=0)
        plain = calls["hooks"]

        def with_hooks(plain: Callable[[], Any] = plain, model: nn.Module = models["hooks"]) -> None:
            with hooked(model):
                plain()

        calls["hooks"] = with_hooks
        started = time.perf_counter()
        for call in calls.values():
            call()
        warm = time.perf_counter() - started
        graphs = [len(handle.backend.graphs) for handle in handles]
        seconds = interleaved(calls, rounds=sizes.rounds)
        count = sizes.prompts * sizes.new if task == "generation" else sizes.batch * sizes.length
        found[task] = {
            "tokens_per_s": {kind: count / statistics.median(s) for kind, s in seconds.items()},
            "seconds_against_clean": {kind: ratio(s, seconds["clean"]) for kind, s in seconds.items()},
            "speed_of_noise_against_hooks": ratio(seconds["hooks"], seconds["noise"]),
            "warm_up_s": warm, "graphs": graphs,
            "compiled_after_warm_up": [len(h.backend.graphs) - n for h, n in zip(handles, graphs, strict=True)],
        }  # fmt: skip
        for handle in handles:
            handle.remove()
        torch._dynamo.reset()
        print(f"{Path(name).name}, {inner}, {task}: " + ", ".join(
            f"{kind} {value:.0f}" for kind, value in found[task]["tokens_per_s"].items()
        ) + f" tokens/s; noise {found[task]['speed_of_noise_against_hooks']['median']:.2f}x hooks", flush=True)  # fmt: skip
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and what it is called with; ``generates`` is for those that have a decoder."""

    model: nn.Module
    given: dict[str, Tensor]
    labels: Tensor
    generates: bool = True

    @classmethod
    def of(cls, name: str, length: int) -> Subject:
        """Load a directory, or make the tiny model of a family of tests/families.py; the first row is padded on the left."""
        if Path(name).is_dir():
            model = load(name)
            given = {"input_ids": tokens(model, 2, length)}
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        else:
            sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
            from tests.families import build, inputs

            model, given = build(name), inputs(name, 2, length, pad=0)
        given["attention_mask"][0, : length // 4] = 0
        labels = given.get("decoder_input_ids", given["input_ids"])
        return cls(model=model, given=given, labels=labels, generates=bool(model.can_generate()))  # type: ignore[operator]

    def outputs(self) -> dict[str, Any]:
        """Return the logits and the gradients of one batch."""
        out = self.model(**self.given, labels=self.labels, **({"use_cache": False} if self.generates else {}))
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return {"logits": out.logits.detach(), **grads}

    def generations(self, new: int) -> dict[str, Tensor]:
        """Return greedy generations with both caches."""
        if not self.generates:
            return {}
        given = {k: v for k, v in self.given.items() if k != "decoder_input_ids"}
        greedy = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return {
            cache: self.model.generate(**given, **greedy, cache_implementation=cache)  # type: ignore[operator]
            for cache in ("dynamic", "static")
        }


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return whether two results are the same bits, and the largest difference of logits and of gradients, as a share of the
    largest logit and of the largest gradient.
    """
    far = {name: (found[name] - value).abs().max() for name, value in wanted.items()}
    size = {name: value.abs().max() for name, value in wanted.items()}
    logits = float(far.pop("logits") / size.pop("logits"))
    return {
        "identical": found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items()),
        "logits": logits, "gradients": float(torch.stack([*far.values()]).max() / torch.stack([*size.values()]).max()),
    }  # fmt: skip


def agreement(name: str, inner: str, sizes: Sizes) -> dict[str, Any]:
    """Return how far level 0 is from the compiled model, and noise from that of the eager backend."""
    subject = Subject.of(name, sizes.prompt)
    model = subject.model

    def compiled(backend: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        torch._dynamo.reset()
        entries = [model, *([model.get_encoder()] if getattr(model.config, "is_encoder_decoder", False) else [])]  # type: ignore[operator]
        for entry in entries:  # generate calls an encoder past the model
            entry.compile(backend=backend)
        found = subject.outputs(), subject.generations(sizes.new) if backend == inner else {}
        for entry in entries:
            entry._compiled_call_impl = None
        torch._dynamo.reset()
        return found

    clean, generated = compiled(inner)
    noise = {"level": LEVEL, "ops": "core", "phases": "both", "seed": 0, "step": 0}
    with instrument(model, inner=inner) as handle:
        record: dict[str, Any] = {"level 0": apart(subject.outputs(), clean)}
        again = subject.generations(sizes.new)
        record["same_generation"] = {cache: bool(torch.equal(again[cache], ids)) for cache, ids in generated.items()}
        with handle.noise(**noise):
            noised = subject.outputs()
        record["unreached"] = list(handle.report().unreached)
    record["noise"] = {"moved": apart(noised, clean)}
    if inner != "eager":
        record["without noise, against eager"] = apart(clean, compiled("eager")[0])
        with instrument(model, inner="eager") as handle, handle.noise(**noise):
            record["noise"]["against eager"] = apart(noised, subject.outputs())
    print(f"{Path(name).name}, {inner}, agreement: {record}", flush=True)
    return record


def memory(name: str, inner: str, sizes: Sizes) -> dict[str, Any]:
    """Return whether 200 noisy steps compile, grow, repeat from the seed, and resume from the middle bit for bit."""
    start = load(name).train()

    def fresh(state: Any = None) -> tuple[nn.Module, Handle, torch.optim.Optimizer]:
        model = copy.deepcopy(start)
        handle = instrument(model, inner=inner)
        handle.set_noise(level=LEVEL, ops="core", phases="both", seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if state is not None:
            model.load_state_dict(state[0])
            handle.load_state_dict(state[1])
            optimizer.load_state_dict(state[2])
        return model, handle, optimizer

    def train(made: tuple[nn.Module, Handle, torch.optim.Optimizer], first: int, last: int) -> tuple[list[float], list[int]]:
        model, _, optimizer = made
        losses, resident = [], []
        for step in range(first, last):
            ids = tokens(model, sizes.batch, sizes.length // 2, seed=step)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            gc.collect() if step % 20 == 0 else None
            resident.append(_resident())
        return losses, resident

    half = sizes.steps // 2
    made = fresh()
    losses, resident = train(made, 0, half)
    state = copy.deepcopy((made[0].state_dict(), made[1].state_dict(), made[2].state_dict()))
    graphs = len(made[1].backend.graphs)
    rest, later = train(made, half, sizes.steps)
    whole = losses + rest
    compiled = len(made[1].backend.graphs) - graphs
    made[1].remove()
    again = fresh()
    repeated, _ = train(again, 0, half)
    again[1].remove()
    resumed = fresh(state)
    after, _ = train(resumed, half, sizes.steps)
    resumed[1].remove()
    record = {
        "steps": sizes.steps, "graphs": graphs, "compiled_in_second_half": compiled,
        "resident_mib": {"after_a_tenth": resident[len(resident) // 5] / 1024, "at_the_end": later[-1] / 1024},
        "repeats_from_the_seed": repeated == losses, "resumes_bit_for_bit": after == rest,
        "loss": {"first": whole[0], "last": whole[-1]},
    }  # fmt: skip
    print(f"{Path(name).name}, {inner}, memory: {record}", flush=True)
    return record


def _resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1])


PARTS = {"speed": speed, "agreement": agreement, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--inner", default="inductor,eager")
    parser.add_argument("--part", default="speed,agreement,memory")
    parser.add_argument("--rounds", type=int, default=Sizes().rounds)
    parser.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    parts = arguments.part.split(",")
    if unknown := set(parts) - PARTS.keys():
        raise SystemExit(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    transformers.logging.set_verbosity_error()
    sizes = QUICK if arguments.quick else Sizes(rounds=arguments.rounds)
    path = Path(arguments.out) if arguments.out else RESULTS / "live.json"
    run = {"new_tokens": sizes.new, "prompts": sizes.prompts, "batch": [sizes.batch, sizes.length]}
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if {key: before[key] for key in run} != run or before["machine"] != machine():
            raise SystemExit(f"{path.name} is of other sizes, another machine or other versions; give another file by --out")
        rows = before["rows"]
    for model, inner, part in itertools.product(arguments.models, arguments.inner.split(","), parts):
        row = rows.setdefault(f"{Path(model).name}, {inner}", {})
        row[part] = PARTS[part](model, inner, sizes)
        finish("live", {**run, "rows": rows}, arguments)


if __name__ == "__main__":
    main()
