"""Scans of activations: the numbers of every site are those of its values, whatever the batches and the padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aqnfx
from aqnfx.errors import InputError, PassError, ProbeError
from aqnfx.numerics.formats import parse_format, quantize
from aqnfx.passes.pipeline import Pipeline
from aqnfx.probes.data.batches import Batch
from aqnfx.probes.forward import eager_forward
from aqnfx.reporting.scan import save_scan
from aqnfx.scanning.activation_scan import scan_activations
from tests.cli.tiny import TEXT, save_model
from tests.families import build
from tests.graph.small import generator

FORMATS = ("mxfp4", "int8:tensor", "int4:g8", "fp8_e4m3:channel", "nvfp4")
SITE = "model.layers.1.mlp.down_proj:linear:0:input"


def batch(ids: torch.Tensor, mask: torch.Tensor | None = None, *, offset: int = 0) -> Batch:
    scored = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    mask = torch.ones_like(ids) if mask is None else mask
    return Batch(
        row_offset=offset, size=len(ids), input_ids=ids, attention_mask=mask, score_mask=scored, answer_mask=None
    )


@pytest.fixture(scope="module")
def tagged() -> Any:
    return Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(build("llama")))


def scanned(tagged: Any, batches: list[Batch], where: str = "ops:linear,roles:input") -> dict[str, Any]:
    program = Pipeline.parse(f'insert-scan{{where="{where}" formats="{"|".join(FORMATS)}"}}')(tagged)
    return {one.site.id: one for one in scan_activations(program, eager_forward(program), batches)}


def test_a_second_scan_starts_anew(tagged: Any) -> None:
    program = Pipeline.parse(f'insert-scan{{where="ops:linear,roles:input" formats="{"|".join(FORMATS)}"}}')(tagged)
    given = [batch(torch.arange(12).reshape(2, 6))]
    first, again = (scan_activations(program, eager_forward(program), given) for _ in range(2))
    assert first == again


def value_of(tagged: Any, site: str, given: Batch) -> torch.Tensor:
    """Return the value at a site, from a program that returns it."""
    place = tagged.places[site]
    kept: list[torch.Tensor] = []

    class Keeper(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n is place.value:
                kept.append(result)
            return result

    with torch.no_grad():
        Keeper(tagged.module).run(*tagged.bind(input_ids=given.input_ids, attention_mask=given.attention_mask))
    return kept[0]


@pytest.mark.parametrize("site", [SITE, "model.layers.0.self_attn:sdpa:0:key"])
def test_records_and_facts_are_those_of_the_values(tagged: Any, site: str) -> None:
    given = batch(torch.randint(3, 90, (3, 11), generator=generator(1)))
    found = scanned(tagged, [given], f"sites:{site}")[site]
    x = value_of(tagged, site, given)
    for name in FORMATS:
        stored = quantize(x, parse_format(name), channel_dim=-1)
        ratio = float(x.double().square().sum() / (stored - x).double().square().sum())
        assert found.formats[name]["sqnr_db"] == pytest.approx(10 * math.log10(ratio), abs=1e-6)
        dead = int(((stored == 0) & (x != 0)).sum()) / int((x != 0).sum())
        assert found.formats[name]["dead_zone"] == pytest.approx(dead, abs=1e-12)
    centred = x.double() - x.double().mean()
    magnitude = x.double().abs().reshape(-1, x.shape[-1]).mean(0)
    assert found.facts["kurtosis"] == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2), rel=1e-9)
    assert found.facts["outlier_ratio"] == pytest.approx(float(magnitude.max() / np.median(magnitude)), rel=1e-9)
    assert (found.facts["low"], found.facts["high"]) == (float(x.min()), float(x.max()))
    assert found.facts["elements"] == x.numel()


def test_padding_does_not_count_and_batches_add_up(tagged: Any) -> None:
    ids = torch.randint(3, 90, (4, 9), generator=generator(2))
    plain = scanned(tagged, [batch(ids)])[SITE]
    halves = scanned(tagged, [batch(ids[:2]), batch(ids[2:], offset=2)])[SITE]
    wide, mask = torch.zeros(4, 12, dtype=ids.dtype), torch.zeros(4, 12, dtype=ids.dtype)
    wide[:, :9], mask[:, :9] = ids, 1
    padded = scanned(tagged, [batch(wide, mask)])[SITE]
    for other in (halves, padded):
        assert other.facts["elements"] == plain.facts["elements"]
        assert other.facts["high"] == pytest.approx(plain.facts["high"], rel=1e-5)
        for name in ("mxfp4", "int4:g8"):  # scales of the whole tensor differ from batch to batch
            assert other.formats[name]["sqnr_db"] == pytest.approx(plain.formats[name]["sqnr_db"], abs=1e-3)


def test_the_values_are_not_changed(tagged: Any) -> None:
    given = batch(torch.randint(3, 90, (2, 7), generator=generator(3)))
    program = Pipeline.parse('insert-scan{where="ops:all,roles:auto" formats=mxfp4}')(tagged)
    with torch.no_grad():
        assert torch.equal(eager_forward(program)(given), eager_forward(tagged)(given))


def test_misuse_is_refused(tagged: Any) -> None:
    with pytest.raises(PassError, match="no format was given"):
        Pipeline.parse('insert-scan{formats=""}')(tagged)
    with pytest.raises(InputError, match="unknown format 'mxfp5'"):
        Pipeline.parse("insert-scan{formats=mxfp5}")(tagged)
    program = Pipeline.parse("insert-scan")(tagged)
    with pytest.raises(PassError, match="scan nodes already"):
        Pipeline.parse("insert-scan")(program)
    with pytest.raises(InputError, match="no samples to scan"):
        scan_activations(program, eager_forward(program), [])
    with pytest.raises(PassError, match="no scan nodes"):
        scan_activations(tagged, eager_forward(tagged), [batch(torch.ones(1, 3, dtype=torch.long))])
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ProbeError, match="nothing was counted"):
        scan_activations(program, eager_forward(program), [batch(ids, torch.zeros_like(ids))])
    weight = program.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = float("nan")
        with pytest.raises(ProbeError, match=r"not finite at model\.layers\.1\.mlp\.down_proj:linear:0:input"):
            scan_activations(program, eager_forward(program), [batch(ids)])
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_a_calibration_that_is_no_json_is_refused(tagged: Any, tmp_path: Path) -> None:
    for text, message in (("[" * 100_000, "is not JSON"), ('{"schema": "aqnfx.scan/1", "ranges": {"a": [1]}}', "not two finite")):
        (tmp_path / "scan.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Pipeline.parse(f'insert-fake-quant{{format=int8:tensor calibration="{tmp_path}/scan.json"}}')(tagged)


def test_a_scan_with_data_feeds_a_calibration(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen2", num_hidden_layers=2)
    found = aqnfx.scan(model, "int8:tensor,mxfp4", data=TEXT, samples=4, batch_size=2, max_length=24)
    record = json.loads(Path(save_scan(found, tmp_path / "out")["scan"]).read_text())
    assert set(record["activations"]["model.layers.0.mlp.down_proj"]["mxfp4"]) >= {
        "sqnr_db", "dead_zone", "saturation", "relative_error", "class",
    }  # fmt: skip
    assert {row["module"] for row in record["activation_ranking"]["mxfp4"]} == set(record["activations"])
    assert record["activation_facts"]["lm_head"]["site"] == "lm_head:linear:0:input"
    assert record["provenance"]["data"]["samples"] == 4
    tagged = Pipeline.parse("tag-layers,tag-ops")(aqnfx.trace(str(model)))
    text = f'insert-fake-quant{{where="ops:linear,roles:input" format=int8:tensor calibration="{tmp_path}/out/scan.json"}}'
    stored = Pipeline.parse(text)(tagged)
    given = batch(torch.randint(3, 40, (2, 9), generator=generator(4)))
    with torch.no_grad():
        clean, static = eager_forward(tagged)(given), eager_forward(stored)(given)
    assert 0.0 < float((clean - static).abs().max()) < 0.5 * float(clean.abs().max())
    low, high = record["ranges"]["lm_head:linear:0:input"]
    assert low < 0.0 < high
    np.testing.assert_allclose(record["activation_facts"]["lm_head"]["high"], high)
    with pytest.raises(InputError, match="samples are about data"):
        aqnfx.scan(model, "mxfp4", samples=4)
