"""The executive summary: a few sentences with numbers and intervals, and with what was not shown."""

from __future__ import annotations

from typing import Any

from aqnfx.diagnosis.advice.recommend import nothing_distinguishable, nothing_grouped
from aqnfx.diagnosis.sensitivity_map import SensitivityMap
from aqnfx.reporting.prediction import agreement_sentence, estimates_sentence
from aqnfx.reporting.sqnr import sqnr_sentence
from aqnfx.reporting.text import factor, factor_range, names, nats, nats_range, percent, percent_range, window_name


def model_name(smap: SensitivityMap) -> str:
    """Return what the model is called, ``the model`` where nothing says so."""
    return str(smap.model.get("name") or "the model")


def confidence_text(smap: SensitivityMap) -> str:
    """Return the confidence as ``"95 %"``."""
    return f"{100.0 * smap.confidence:g} %"


def summary_sentences(smap: SensitivityMap) -> list[str]:
    """Return three to six sentences of plain text (no markup) on the whole map."""
    sentences = [_what_was_done(smap)]
    if smap.partial:
        asked = smap.task.get("samples_requested", "?")
        sentences.append(f"The run was interrupted: {smap.samples} of {asked} samples were finished.")
    if nothing_grouped(smap):
        return [*sentences, *_sites(smap), *(s for s in (agreement_sentence(smap),) if s is not None)]
    if nothing_distinguishable(smap):
        sentences.append(_nothing(smap))
        worst = [_entry_text(rows[0]) for rows in smap.ranking.values() if rows]
        if worst:
            sentences.append(f"The largest estimates, none of them established: {'; '.join(worst)}.")
        return sentences
    for one, many, name in (("operator", "operators", "operators"), ("layer", "layers", "layers")):
        sentences += _most_sensitive(smap, one, many, smap.ranking.get(name, []))
    sentences += _windows(smap)
    sentences.append(_critical(smap))
    return [*sentences, *(s for s in (agreement_sentence(smap), estimates_sentence(smap), sqnr_sentence(smap)) if s is not None)]


def _what_was_done(smap: SensitivityMap) -> str:
    how = "predicted, and in part measured," if smap.method != "measure" else "perturbed"
    parts = [(len(smap.per_operator), "operator kind"), (len(smap.per_layer), "layer"), (len(smap.windows), "window")]
    probed = names([_plural(count, word) for count, word in parts if count])
    if not probed:
        single = sum(bool(site["measured"] or site.get("estimated")) for site in smap.per_site)
        probed = _plural(single, "single site") if single else "all sites together"
    data = f"{_plural(smap.samples, 'sample')} ({_plural(int(smap.task['tokens']), 'position')})"
    perturbation = smap.perturbation
    done = perturbation.done(smap.levels, smap.unit_error)
    seeds = f" with {_plural(len(smap.seeds), 'seed')}" if perturbation.repeats else ""
    at = f" {perturbation.at(smap.base_level)}" if perturbation.repeats else ""
    where = f"on {data}{seeds}; ranges are {confidence_text(smap)} intervals{at}"
    return f"{probed} of {model_name(smap)} were {how} with {done}, {where}."


def title(smap: SensitivityMap) -> str:
    """Return what the report is of."""
    return smap.perturbation.words.title.format(model=model_name(smap), name=smap.perturbation.name)


def at_level(smap: SensitivityMap) -> str:
    """Return "at level 0.05", or "in mxfp4"."""
    return smap.perturbation.at(smap.base_level)


def _sites(smap: SensitivityMap) -> list[str]:
    """Name the measured single site with the largest KL."""
    known = [s for s in smap.per_site if s["measured"].get(smap.base_key, {}).get("kl") is not None]
    if not known:
        return []
    worst = max(known, key=lambda site: float(site["measured"][smap.base_key]["kl"]))
    record = worst["measured"][smap.base_key]
    shown = "" if record["distinguishable"] else ", not distinguishable from no effect"
    return [
        f"Of {_plural(len(known), 'measured site')} the most sensitive is {worst['id']}: KL {nats(record['kl'])} nats/token "
        f"({nats_range(record['ci'])}), degradation {percent(record['degradation'])}{shown}."
    ]


def _nothing(smap: SensitivityMap) -> str:
    also = ", more seeds or higher levels" if smap.perturbation.repeats else ""
    return (
        f"Nothing was found: no operator, layer or window has a degradation distinguishable from 0 {at_level(smap)}; more "
        f"samples{also} are needed before any of this is acted on."
    )


def _most_sensitive(smap: SensitivityMap, one: str, many: str, rows: list[dict[str, Any]]) -> list[str]:
    predicted = [row["key"] for row in rows if row.get("estimated")]
    rows = [row for row in rows if not row.get("estimated")]
    if not rows:
        return []
    if predicted:
        many = f"measured {many}"
    if not any(row["distinguishable"] for row in rows):
        return [f"No {one} is distinguishable from no effect on its own."]
    text = f"The most sensitive {one} is {_entry_text(rows[0])}, class {rows[0]['class']}"
    if len(rows) == 1:
        return [f"{text}; it is the only {one} measured."]
    # The first two are compared in both families of tests; a tie in either is a tie, as the table marks it.
    tied = [r["key"] for place, r in enumerate(rows[1:]) if r["tied_with_first"] or (place == 0 and rows[0]["tied_with_next"])]
    if tied:
        return [f"{text}; it is not distinguishable from {names(tied)}."]
    return [f"{text}; it is distinguishable from all other {many}, next is {rows[1]['key']}."]


def _entry_text(row: dict[str, Any]) -> str:
    return (
        f"{row['key']}: degradation {percent(row['degradation'])} ({percent_range(row['degradation_ci'])}) and KL "
        f"{nats(row['kl'])} nats/token ({nats_range(row['kl_ci'])})"
    )


def _windows(smap: SensitivityMap) -> list[str]:
    known = [w for w in smap.windows if w.get("degradation") is not None and not w.get("estimated")]
    if not known:
        return []
    worst = max(known, key=lambda window: float(window["degradation"]))
    text = f"{percent(worst['degradation'])} ({percent_range(worst.get('degradation_ci'))})"
    if worst["amplification"] is not None:
        whole = "its prediction" if smap.method != "measure" else "the sum of its layers"
        ratio, span = factor(worst["amplification"]), factor_range(worst.get("amplification_ci"))
        text += f", {ratio} times {whole} ({span})"
    points = [window_name(layers) for layers in smap.avalanche_points]
    if points:
        found = f"{len(points)} of {_plural(len(known), 'window')} are avalanche points ({names(points)})"
        return [f"{found}; the worst, layers {window_name(worst['layers'])}, loses {text}."]
    return [f"No window is an avalanche point; the worst, layers {window_name(worst['layers'])}, loses {text}."]


def _critical(smap: SensitivityMap) -> str:
    if not smap.critical_ops and not smap.critical_layers:
        return "No operator and no layer is critical beyond the noise of the measurement."
    parts = []
    if smap.critical_ops:
        parts.append(f"operators {names(smap.critical_ops)}")
    if smap.critical_layers:
        parts.append(f"layers {names(smap.critical_layers)}")
    return f"Critical, with the whole interval above robust: {'; '.join(parts)}."


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
