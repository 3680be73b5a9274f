"""Train the embedded model with weights and activations in 2 bits and gradients in 8, and see what that saves of it.

    python examples/quantised_training.py                       # 60 steps with formats and 60 without: minutes
    python examples/quantised_training.py --quick               # 4 steps of each
    python examples/quantised_training.py --format mxfp8_e4m3   # other formats; --gradient "" leaves gradients as they are

A Program shares its parameters with the model that it was traced from, so an optimiser that steps on the Program's losses
trains the model. Seeded: the same flags, versions and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import aqnfx
from aqnfx.data import embedded_model, embedded_problems
from aqnfx.graph.program import Program

HELD_OUT = 64


def quantised(program: Program, form: str, gradient: str) -> Program:
    """Return the program with formats in all products of its layers, forward and backward.

    y = Q(x)·Q(W)ᵀ on the way forward; on the way back dx = Q(dy)·Q(W) and dW = Q(dy)ᵀ·Q(x), so the gradient's format is on
    the outputs. The weights that the optimiser changes stay in fp32.
    """
    passes = ["tag-layers", "tag-ops"]
    inside = "ops:linear,modules:model.layers.*"
    passes.append(f'insert-fake-quant{{where="{inside},roles:weight|input" format={form}}}')
    if gradient:
        passes.append(f'insert-fake-quant{{where="{inside}" format="" gradient={gradient}}}')
    return aqnfx.Pipeline.parse(",".join(passes))(program)


def loss_of(program: Program, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Return the mean negative log-likelihood of the texts' tokens (nats/token)."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    logits = program(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def train(
    program: Program, tokenizer: PreTrainedTokenizerBase, texts: list[str], arguments: argparse.Namespace
) -> list[float]:
    """Train the model that shares the program's parameters; return the loss of every step."""
    rng, losses = random.Random(arguments.seed), []
    parameters = list(program.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate)
    for _ in range(arguments.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(program, tokenizer, rng.sample(texts, arguments.batch_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int2:g32", help="of weights and activations (default: %(default)s)")
    parser.add_argument("--gradient", default="fp8_e5m2", help="of the gradients of outputs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0, help="which problems come when")
    parser.add_argument("--quick", action="store_true", help="4 steps of 4 problems")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.batch_size = 4, 4
    torch.use_deterministic_algorithms(True)

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    problems = [json.loads(line) for line in embedded_problems().read_text(encoding="utf-8").splitlines()]
    texts = [f"Q: {p['question']}\nA: {p['answer']}\n" for p in problems]
    held_out = texts[: 4 if arguments.quick else HELD_OUT]

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    clean = aqnfx.trace(model)
    small = quantised(clean, arguments.format, arguments.gradient)
    start = copy.deepcopy(model.state_dict())
    name = f"{arguments.format}, gradients {arguments.gradient or 'as they are'}"
    print("passes:", small.pipeline)
    print(f"loss of {len(held_out)} problems that are not trained on (nats/token)")
    print(f"{'weights':44}  {'fp32':>8}  {arguments.format:>12}")

    def report(row: str) -> None:
        with torch.no_grad():
            losses = [float(loss_of(program, tokenizer, held_out)) for program in (clean, small)]
        print(f"{row:44}  {losses[0]:8.4f}  {losses[1]:12.4f}")

    report("as they come")
    for row, program in ((f"{arguments.steps} steps in fp32", clean), (f"{arguments.steps} steps in {name}", small)):
        model.load_state_dict(start)  # the programs' parameters are these
        losses = train(program, tokenizer, texts[HELD_OUT:], arguments)
        report(row)
        print(f"    loss while training: first {losses[0]:.4f}, last {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
