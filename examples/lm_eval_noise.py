"""lm-evaluation-harness on a model with noise: a local task, clean and at two levels.

    pip install 'aqnfx[harness]'
    python examples/lm_eval_noise.py [MODEL] [--data FILE] [--limit 50] [--quick]

MODEL is a Hugging Face directory (default: the embedded tinygsm), FILE holds JSON lines with "question" and "answer". The
task is asked in the harness's own format; its answers come from the model as it is instrumented, so every task does.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local

import transformers

from aqnfx import instrument
from aqnfx.data import embedded_model, embedded_problems
from aqnfx.errors import InputError
from aqnfx.live.harness import harness_lm


def task(data: Path, tokens: int) -> dict[str, Any]:
    """Return a task of the harness over records with question and answer: the number after #### is compared."""
    return {
        "task": "local_problems", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "Q: {{question}}\nA: ",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}", "target_delimiter": "", "num_fewshot": 0,
        "generation_kwargs": {"until": ["\nQ:"], "max_gen_toks": tokens, "do_sample": False},
        "filter_list": [{"name": "number", "filter": [
            {"function": "regex", "regex_pattern": "#### (-?[0-9.,]+)"}, {"function": "take_first"},
        ]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    name, data = arguments.model or embedded_model(), arguments.data or embedded_problems()
    limit, tokens, levels = (2, 4, (0.2,)) if arguments.quick else (arguments.limit, 80, (0.1, 0.2))
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    with instrument(model, inner="eager", dynamic=True) as handle:
        try:
            lm = harness_lm(handle, tokenizer, batch_size=min(limit, 16))
        except InputError as error:
            raise SystemExit(str(error)) from error
        from lm_eval.evaluator import simple_evaluate

        for level in (0.0, *levels):
            handle.set_noise(level=level, ops="linear", seed=0, step=0)
            found = simple_evaluate(lm, tasks=[task(data, tokens)], limit=limit, bootstrap_iters=100, log_samples=False)
            row = found["results"]["local_problems"]
            print(f"noise {level:4.0%}: exact match {row['exact_match,number']:.3f} ± {row['exact_match_stderr,number']:.3f}")


if __name__ == "__main__":
    main()
