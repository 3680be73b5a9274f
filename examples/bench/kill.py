"""Kills a sweep by SIGKILL at random moments, resumes it, and compares the end with an undisturbed run.

    python examples/bench/kill.py [--kills 100] [--seed 0]

Sweeps over a tiny model with random weights run in child processes that share one journal per sweep. Checked: every
resume completes; the scores are identical to those of an undisturbed run; no item is computed again that the journal
held. POSIX only. Exits with 1 where one of these fails.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aqnfx import Pipeline, trace
from aqnfx.graph.selector import Selector
from aqnfx.probes.data.batches import Encoded, make_batches
from aqnfx.probes.journal import Journal
from aqnfx.probes.measure import Sweep, measure
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.probe_sets import plan_probes
from aqnfx.probes.replay import BlockReplay
from aqnfx.probes.work import Item, Worker

IDENTITY = {"run": "kill"}


class Bench:
    """A sweep of 150 runs of some milliseconds each."""

    def __init__(self) -> None:
        import transformers

        config = transformers.AutoConfig.for_model(
            "llama", vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        tags = 'tag-layers,tag-ops,insert-noise{where="ops:linear"},partition-blocks'
        self.program = Pipeline.parse(tags)(trace(model))
        probes = plan_probes(self.program, Selector.parse("ops:linear"), kinds=("layer",))
        self.plan = Sweep(probes=probes, levels=(0.1, 0.2), seeds=(0, 1, 2), base_level=0.1, task="kl")
        rng = np.random.default_rng(0)
        samples = [
            Encoded(input_ids=tuple(rng.integers(3, 99, 24).tolist()), score_from=1, answer=None) for _ in range(10)
        ]
        self.batches = list(make_batches(samples, batch_size=2, pad_id=0))

    def run(self, journal: Journal | None = None) -> Measurements:
        """Run what the journal does not hold."""
        engine = BlockReplay(self.program, starts=[p.sites for p in self.plan.probes])
        return measure(self.program, engine, self.batches, self.plan, journal=journal)


def forked(call: Callable[[], Any]) -> int:
    """Run ``call`` in a child process and return its id; the child exits with 0 when it returns."""
    child = os.fork()
    if child:
        return child
    try:
        call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def life(bench: Bench, place: Path) -> None:
    """Run the sweep on the journal at ``place``; write down which items are begun, and the scores when it is complete."""
    begun = os.open(place / "begun", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    original = Worker._run

    def noted(self: Worker, item: Item) -> Any:
        os.write(begun, f"{item}\n".encode())
        return original(self, item)

    Worker._run = noted  # type: ignore[method-assign]
    with Journal(place / "journal", IDENTITY) as journal:
        found = bench.run(journal)
    np.save(place / "scores.npy", found.scores["kl"])


def recorded(place: Path) -> set[str]:
    """Return the items that the journal holds, as the log writes them."""
    if not (place / "journal").exists():
        return set()
    with Journal(place / "journal", IDENTITY) as journal:
        return {str(item) for item in journal.items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no thread pool
    bench, rng = Bench(), random.Random(arguments.seed)
    expected = bench.run().scores["kl"]
    kills = lives = sweeps = repeated = 0
    with tempfile.TemporaryDirectory() as folder:
        while kills < arguments.kills:
            place, sweeps = Path(folder) / str(sweeps), sweeps + 1
            place.mkdir()
            while True:
                before = recorded(place)
                (place / "begun").unlink(missing_ok=True)  # a process killed at once has begun nothing
                child, lives = forked(lambda place=place: life(bench, place)), lives + 1
                if kills < arguments.kills:
                    time.sleep(rng.uniform(0.0, 0.25))
                    os.kill(child, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                begun = set((place / "begun").read_text().split("\n")) - {""} if (place / "begun").exists() else set()
                repeated += len(begun & before)
                if status == 0:
                    break
                if status != -signal.SIGKILL:
                    sys.exit(f"a resumed run failed with exit code {status}")
                kills += 1
            if not np.array_equal(np.load(place / "scores.npy"), expected):
                sys.exit("the scores of a killed and resumed sweep differ from those of an undisturbed one")
    if repeated:
        sys.exit(f"{repeated} items were computed again although the journal held them")
    print(f"{kills} kills over {sweeps} sweeps and {lives} processes: every resume completed, scores identical, no item twice")


if __name__ == "__main__":
    main()
