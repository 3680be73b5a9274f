"""Diagnose a model from Python and print the ranking of its operator kinds with intervals.

    python examples/diagnose_model.py                     # the embedded model, 64 word problems: a minute or two
    python examples/diagnose_model.py --quick             # 8 word problems, operator kinds only
    python examples/diagnose_model.py DIR --data my.jsonl # a local Hugging Face model on your own data

With --out DIR the report and the sensitivity map are written there.
"""

from __future__ import annotations

import argparse

import aqnfx
from aqnfx.data import embedded_problems
from aqnfx.diagnosis.advice.recommend import recommend
from aqnfx.reporting.report import save_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tinygsm")
    parser.add_argument("--data", default=str(embedded_problems()))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--out", default=None)
    parser.add_argument("--quick", action="store_true", help="8 samples, one level, operator kinds only")
    arguments = parser.parse_args()
    settings = dict(
        samples=arguments.samples, levels=tuple(arguments.levels), base_level=max(arguments.levels), seeds=2
    )
    if arguments.quick:
        settings |= dict(samples=8, levels=(0.2,), base_level=0.2, seeds=1, probes=("operator",), compile="no")

    smap = aqnfx.diagnose(arguments.model, arguments.data, **settings)

    print(f"{smap.samples} samples, {smap.task['tokens']} scored tokens, noise level {smap.base_level:g}")
    print(f"{'operator':12} {'degradation':>11}  {'95 % interval':>16}  {'KL':>9}  class")
    for entry in smap.ranking["operators"]:
        low, high = entry["degradation_ci"]
        mark = "" if entry["distinguishable"] else "  (not distinguishable from no effect)"
        print(
            f"{entry['key']:12} {entry['degradation']:11.1%}  {low:7.1%} {high:8.1%}  {entry['kl']:9.3g}"
            f"  {entry['class']}{mark}"
        )
    if smap.critical_layers:
        print("critical layers:", ", ".join(map(str, smap.critical_layers)))
    first = recommend(smap)[0]
    print(f"first recommendation: {first.what}: {first.action}")
    for note in smap.notes:
        print("note:", note)
    if arguments.out:
        print("report:", save_report(smap, arguments.out)["markdown"])


if __name__ == "__main__":
    main()
