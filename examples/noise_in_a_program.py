"""Trace a model, put noise into its graph, steer it with the controls, count it, and take it out again.

python examples/noise_in_a_program.py [--quick]
"""

from __future__ import annotations

import argparse

import torch

import aqnfx


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two noise levels instead of five")
    arguments = parser.parse_args()
    levels = (0.05, 0.2) if arguments.quick else (0.01, 0.02, 0.05, 0.1, 0.2)

    program = aqnfx.trace("tinygsm")
    ids = torch.arange(4, 36).reshape(2, 16)
    clean = program(input_ids=ids).logits  # a Program is called like its model; a missing mask is all ones

    noisy = aqnfx.Pipeline.parse("tag-layers,tag-ops,insert-noise{where='ops:core'}")(program)
    print(f"{len(noisy.sites)} sites in {len(noisy.layers)} layers, noise nodes at {len(noisy.controls.sites)} of them")
    print("pipeline:", noisy.pipeline)
    print("level 0 is the identity, bit for bit:", torch.equal(noisy(input_ids=ids).logits, clean))

    # Levels, seeds and sites are buffers of the graph: setting them traces and compiles nothing.
    print("level  largest change of a logit, noise at layers 0-3")
    for level in levels:
        with noisy.noise(layers=["0-3"], level=level, seed=7):
            change = noisy(input_ids=ids).logits - clean
        print(f"{level:5}  {float(change.abs().max()):.4f}")

    # A sample's noise does not depend on the batch that it is in: row_offset says which sample the first row is.
    with noisy.noise(level=0.1, seed=7):
        together = noisy(input_ids=ids).logits[1:]
    with noisy.noise(level=0.1, seed=7, row_offset=1):
        alone = noisy(input_ids=ids[1:]).logits
    print(f"sample 1 alone and in a batch of two differ by {float((together - alone).abs().max()):.1e}")

    # Counters say whether the noise that was asked for has been injected.
    controls = noisy.controls
    controls.reset_hits()
    with noisy.noise(where="modules:*.k_proj", level=0.1):
        noisy(input_ids=ids)
    fired = [site for site, count in controls.hits().items() if count]
    print(f"{len(fired)} sites injected noise, first {fired[0]}")

    stripped = aqnfx.Pipeline.parse("strip")(noisy)
    print("strip restores the traced graph:", stripped.fingerprint == program.fingerprint)


if __name__ == "__main__":
    main()
