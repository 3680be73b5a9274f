"""Answers that a model generates: compared with plain ``generate``, noised, and through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aqnfx.diagnosis.diagnose import run
from aqnfx.diagnosis.forecast import forecast
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.errors import InputError, SelectorError
from aqnfx.graph.frontend import trace
from aqnfx.live.generation import Generator, final_answer, until
from aqnfx.probes.data.samples import load_tokenizer
from tests.cli.tiny import save_answers, save_model

QUESTIONS = ("One dog?", "A red barn and a blue stone by a river?", "Two", "The rain fell on the roof?", "Cat", "Who sang?")
NEW = 6
CHOSEN: dict[str, Any] = {
    "task": "generate", "samples": len(QUESTIONS), "ops": "linear", "levels": (0.5,), "seeds": 2, "probes": ("all",),
    "method": "measure", "batch_size": 4, "max_new_tokens": NEW, "stop": ("|||",), "compile": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model, and questions whose answers are what it says: a clean run gets all but the last of them right."""
    folder = tmp_path_factory.mktemp("generation")
    directory = save_model(folder / "model")
    return directory, save_answers(directory, folder / "data.jsonl", QUESTIONS, NEW)


def test_final_answers() -> None:
    assert final_answer("1+1=2.\n#### 1,002 \nQ: more", True) == "1002"
    assert final_answer("1+1=2.", True) == ""
    assert final_answer(" yes, it is\n", False) == "yes, it is"


def test_what_follows_the_end_is_no_answer() -> None:
    assert until([5, 6, 2, 0, 0], {2, 7}) == [5, 6]
    assert until([5, 6], {2}) == [5, 6]


@pytest.mark.slow
def test_generated_answers_are_those_of_the_model_one_by_one(made: tuple[Path, Path]) -> None:
    directory, data = made
    found = run(str(directory), data, Options(**CHOSEN))
    right = dict(zip(QUESTIONS, [1.0] * 5 + [0.0], strict=True))
    # Samples stand in the order of their lengths.
    lengths = sorted(QUESTIONS, key=lambda question: len(question) + (NEW if right[question] else len("no")))
    assert found.clean["exact_match"].tolist() == [right[q] for q in lengths]
    noisy = found.scores["exact_match"]
    assert noisy.shape == (1, 1, 2, len(QUESTIONS))
    assert np.isin(noisy, (0.0, 1.0)).all()
    assert noisy.mean() < found.clean["exact_match"].mean()
    assert (found.scores["kl"] > 0.0).all()


@pytest.mark.slow
def test_noise_is_of_the_sample_and_the_seed(made: tuple[Path, Path]) -> None:
    directory, data = made
    options = Options(**CHOSEN)
    ready = prepare_probes(str(directory), data, options, tell=lambda _: None)
    assert ready.model is not None
    sites = [site.id for site in ready.program.sites if site.op == "linear"]
    batches = ready.batches(options)
    with Generator.of(
        ready.model, ready.tokenizer, ready.encoded, pad=ready.pad, where=options.where, noise=options.noise,
        max_new_tokens=NEW, stop=(),
    ).handle as handle:  # fmt: skip
        answers = Generator(
            handle=handle, model=ready.model, tokenizer=ready.tokenizer, samples=ready.encoded, pad=ready.pad, max_new_tokens=NEW,
            stop=("|||",),
        )  # fmt: skip
        clean = answers.texts(batches[0])

        def noised(seed: int) -> list[str]:
            handle.set_noise(sites=sites, level=0.3, seed=seed, step=0, row_offset=0)
            texts = answers.texts(batches[0])
            handle.set_noise(level=0.0, step=0)
            return texts

        first, second, again = noised(0), noised(1), noised(0)
        assert first == again
        assert first not in (clean, second)
        assert answers.texts(batches[0]) == clean
        # Stopped where a text says so.
        letter = clean[0][2]
        short = Generator(
            handle=handle, model=ready.model, tokenizer=ready.tokenizer, samples=ready.encoded, pad=ready.pad, max_new_tokens=NEW,
            stop=(letter,),
        )  # fmt: skip
        assert short.texts(batches[0]) == [text.partition(letter)[0] for text in clean]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "kl"}, "max_new_tokens is for task generate"),
        ({"task": "kl", "max_new_tokens": None}, "stop is for task generate"),
        ({"perturb": "int8", "levels": (1.0,), "seeds": 1}, "task generate measures noise"),
        ({"executor": "ray"}, "task generate runs in one process"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"stop": 5}, "stop must be texts that are not empty"),
    ],
)
def test_options_that_cannot_be_meant(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options(**{**CHOSEN, **change})


def test_what_it_takes_is_said_before(made: tuple[Path, Path]) -> None:
    directory, data = made
    options = Options(**CHOSEN)
    found = forecast(prepare_probes(str(directory), data, options, tell=lambda _: None), options)
    assert found.new_tokens == NEW
    assert any("6 batches of answers of at most 6 tokens" in line for line in found.lines())  # two, clean and with two seeds


def test_what_cannot_generate_is_refused(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, data = made

    def slow(*_: Any, **__: Any) -> Any:
        raise AssertionError("refused too late")

    monkeypatch.setattr("aqnfx.diagnosis.diagnose.predict", slow)
    program, tokenizer = trace(str(directory)), load_tokenizer(str(directory))
    with pytest.raises(InputError, match="a Program was given"):
        run(program, data, Options(**{**CHOSEN, "method": "both"}), tokenizer=tokenizer)
    with pytest.raises(InputError, match="task generate needs"):
        run(str(directory), ["A text without a question, and long enough to be scored."], Options(**CHOSEN))
    with pytest.raises(InputError, match=r"the model takes \d+: lower max_new_tokens"):
        run(str(directory), data, Options(**{**CHOSEN, "max_new_tokens": 10**6}))
    with pytest.raises(SelectorError):
        run(str(directory), data, Options(**{**CHOSEN, "layers": "99"}))
