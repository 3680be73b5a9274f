"""Activation statistics of what a diagnosis prepared, on its samples or on other data."""

from __future__ import annotations

from aqnfx.diagnosis.options import Options
from aqnfx.graph.lengths import serves
from aqnfx.passes.insert_capture import InsertCapture
from aqnfx.probes.capture import Captures, capture
from aqnfx.probes.data.batches import make_batches
from aqnfx.probes.data.examples import Data
from aqnfx.probes.data.limits import check_tokens, vocabulary
from aqnfx.probes.data.samples import load_samples
from aqnfx.probes.forward import eager_forward
from aqnfx.probes.prepare import Prepared


def capture_on(data: Data | None, ready: Prepared, options: Options) -> Captures:
    """Return activation statistics of the selected sites on ``data`` (None: the samples), at most as long as the samples."""
    encoded = ready.encoded
    if data is not None:
        encoded, _ = load_samples(
            data, ready.tokenizer, samples=options.samples, max_length=ready.longest, text_field=options.text_field,
            pack=options.pack,
        )  # fmt: skip
        check_tokens(encoded, vocabulary(ready.program), ready.tokenizer)
    fixed = ready.fixed if serves(ready.program, {len(e.input_ids) for e in encoded}) else ready.longest
    made = make_batches(encoded, batch_size=min(options.batch_size, len(encoded)), pad_id=ready.pad, fixed_length=fixed)
    program = InsertCapture(where=options.where, perturb=options.captured)(ready.program)
    return capture(program, eager_forward(program), [batch.to(ready.device) for batch in made])
