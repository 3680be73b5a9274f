"""Train a small language model on synthetic grade-school problems, from nothing.

Writes a directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, with held-out problems beside the weights.
The model embedded in aqnfx is of this kind: same problems, same tokenizer, same architecture.

    python examples/train_tinygsm.py --quick              # well under a minute: a tiny model, a falling loss
    python examples/train_tinygsm.py --out my-model       # the full size: hours on two cores

Seeded: the same flags, versions and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

NAMES = ("Tom", "Ana", "Sam", "Mia", "Ben", "Zoe", "Leo", "Ivy", "Max", "Eva", "Raj", "Lin")
THINGS = ("apples", "pens", "cards", "shells", "coins", "books", "eggs", "stamps", "beads", "toys")
CHARACTERS = sorted("\n !#*+-./0123456789:=?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
VOCAB_SIZE = 80  # 3 special tokens, 74 characters and <unk>, rounded up to a multiple of eight
MAX_NEW_TOKENS = 100  # the longest answer has four steps and takes about 60 characters
HELD_OUT_SEED_OFFSET = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a training run depends on; the fields are the command-line options."""

    steps: int = 12_000
    batch_size: int = 32
    layers: int = 16
    hidden: int = 128
    seed: int = 0
    problems: int = 1_000
    threads: int = 0
    learning_rate: float = 1e-3


QUICK = Settings(steps=80, batch_size=16, layers=2, hidden=64, problems=16, learning_rate=4e-3)


# Problems ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and its worked answer, which ends in GSM8K's ``#### N``."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Q: {self.question}\nA:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}\n"

    @property
    def result(self) -> str:
        return final_number(self.answer)


def final_number(answer: str) -> str:
    """Return what follows the first ``#### `` up to the end of that line; empty when there is none."""
    return answer.partition("#### ")[2].partition("\n")[0].strip()


def next_step(rng: random.Random, name: str, things: str, count: int) -> tuple[str, str, int]:
    """Return a sentence that changes ``count``, the calculation it asks for, and the new count (never negative)."""
    if count > 400:
        kinds = ["give", "lose"]
    else:
        kinds = ["buy", "find"]
        if count >= 2:
            kinds += ["give", "lose", "half" if count % 2 == 0 else "give"]
        if count <= 30:
            kinds += ["times"]
    match rng.choice(kinds):
        case "buy":
            more = rng.randint(2, 99)
            return f"{name} buys {more} more.", f"{count}+{more}", count + more
        case "find":
            more = rng.randint(2, 99)
            return f"{name} finds {more} {things}.", f"{count}+{more}", count + more
        case "give":
            less = rng.randint(1, min(count, 99))
            return f"{name} gives away {less}.", f"{count}-{less}", count - less
        case "lose":
            less = rng.randint(1, min(count, 99))
            return f"{name} loses {less} {things}.", f"{count}-{less}", count - less
        case "half":
            return f"{name} sells half.", f"{count}/2", count // 2
        case _:
            factor = rng.randint(2, 5)
            return f"Then {name} has {factor} times as many.", f"{count}*{factor}", count * factor


def make_problem(rng: random.Random) -> Problem:
    """Draw a problem of one to four steps."""
    name, things, count = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 99)
    sentences, steps = [f"{name} has {count} {things}."], []
    for _ in range(rng.choice((1, 2, 2, 3, 3, 4))):
        sentence, calculation, count = next_step(rng, name, things, count)
        sentences.append(sentence)
        steps.append(f"{calculation}={count}.")
    return Problem(question=f"{' '.join(sentences)} How many {things} now?", answer=f"{' '.join(steps)}\n#### {count}")


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """Return ``count`` problems with distinct questions, from a stream of their own."""
    rng = random.Random(seed + HELD_OUT_SEED_OFFSET)
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = make_problem(rng)
        found.setdefault(problem.question, problem)
    return list(found.values())


def training_problems(seed: int, held_out: list[Problem]) -> Iterator[Problem]:
    """Yield problems without end, none of them with a held-out question."""
    rng, forbidden = random.Random(seed), {problem.question for problem in held_out}
    while True:
        problem = make_problem(rng)
        if problem.question not in forbidden:
            yield problem


# Tokenizer and model -------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a character tokenizer written in the byte-level alphabet (space ``Ġ``, newline ``Ċ``).

    For model type ``qwen2``, ``AutoTokenizer`` builds the byte-level Qwen2 tokenizer whatever class was saved, so a
    vocabulary with a literal space or newline would silently lose them.
    """
    to_byte_level = {" ": "Ġ", "\n": "Ċ"}
    entries = [PAD, BOS, EOS, *(to_byte_level.get(c, c) for c in CHARACTERS), UNK]
    vocab = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_round_trip(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Raise ``ValueError`` when a text does not come back from its tokens, one token per character."""
    for text in [*texts, "Q: a  b\n\nA: 1+2=3.\n#### 3\n"]:
        ids = tokenizer(text).input_ids
        back = tokenizer.decode(ids, skip_special_tokens=True)
        if back != text or len(ids) != len(text) + 1:
            raise ValueError(f"the tokenizer turns {text!r} into {len(ids)} tokens and back into {back!r}")


def make_model(settings: Settings) -> Qwen2ForCausalLM:
    """Return an untrained float32 model: 32 dimensions per head, two query heads per key-value head."""
    heads = settings.hidden // 32
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config)


# Training and evaluation ---------------------------------------------------------------------------------------------


def make_batch(tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> dict[str, torch.Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, int64 [batch, longest]; padding has label -100."""
    batch = tokenizer([p.text + EOS for p in problems], return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the linear warm-up over the first twentieth, then the cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Iterator[Problem], settings: Settings
) -> tuple[float, float]:
    """Train in place; return the mean loss (nats/token) of the first and of the last tenth of the steps."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() <= 1]  # norms and biases
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    losses: list[float] = []
    model.train()
    with progress_bar() as bar:
        task = bar.add_task("train", total=settings.steps)
        for step in range(settings.steps):
            batch = make_batch(tokenizer, [next(problems) for _ in range(settings.batch_size)])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.update(task, advance=1, description=f"train, loss {losses[-1]:.3f}")
            if step == 0 or (step + 1) % max(1, settings.steps // 8) == 0:
                bar.console.print(f"step {step + 1:>6}  loss {losses[-1]:.4f}")
    tenth = max(1, settings.steps // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], batch_size: int = 64
) -> float:
    """Return the fraction of problems whose final number greedy decoding gets right."""
    right = 0
    model.eval()
    with progress_bar() as bar:
        for start in bar.track(range(0, len(problems), batch_size), description="evaluate"):
            chunk = problems[start : start + batch_size]
            inputs = tokenizer([p.prompt for p in chunk], return_tensors="pt", padding=True)
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            right += sum(final_number(a) == p.result for a, p in zip(answers, chunk, strict=True))
    return right / len(problems)


def save(model: PreTrainedModel, held_out: list[Problem], out: Path) -> None:
    """Write weights (bf16), configuration, tokenizer and held-out problems to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(out)
    make_tokenizer().save_pretrained(out)  # a new one: the one in use carries the last batch's padding settings
    lines = [json.dumps({"question": p.question, "answer": p.answer}) for p in held_out]
    (out / "problems_test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# Command line --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> tuple[Settings, Path]:
    """Return the settings and the output directory that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for seconds; other flags still count")
    parser.add_argument("--out", type=Path, default=Path("aqnfx-out/tinygsm"), help="directory (default: %(default)s)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="hidden size, a multiple of 32")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--problems", type=int, help="number of held-out problems")
    parser.add_argument("--threads", type=int, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--learning-rate", type=float, help="at the peak of the schedule")
    args = parser.parse_args(argv)
    preset = QUICK if args.quick else Settings()
    chosen = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    settings = Settings(**{f.name: getattr(preset, f.name) for f in fields(Settings)} | chosen)
    for name in ("steps", "batch_size", "layers", "hidden", "problems"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if settings.hidden % 32:
        parser.error(f"--hidden {settings.hidden} is not a multiple of 32")
    return settings, args.out


def main() -> None:
    settings, out = parse()
    transformers_logging.disable_progress_bar()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)

    held_out = held_out_problems(settings.problems, settings.seed)
    tokenizer = make_tokenizer()
    model = make_model(settings)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {settings.steps:,} steps of {settings.batch_size} problems")
    first, last = train(model, tokenizer, training_problems(settings.seed, held_out), settings)
    print(f"loss: {first:.3f} in the first tenth, {last:.3f} in the last (nats/token)")

    save(model, held_out, out)
    # What counts is what others will load, so the saved files are checked, not the objects in memory.
    saved_tokenizer = AutoTokenizer.from_pretrained(out)
    check_round_trip(saved_tokenizer, [p.text for p in held_out])
    saved_model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    score = exact_match(saved_model, saved_tokenizer, held_out)
    print(f"exact match: {score:.3f} of {len(held_out)} held-out problems (a quick run is not expected to solve any)")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
