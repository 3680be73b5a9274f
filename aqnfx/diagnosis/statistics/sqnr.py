"""Where the signal-to-quantisation-noise ratio of a site would have misled: it does not know what the model depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from aqnfx.diagnosis.sensitivity_map import level_key
from aqnfx.numerics.perturbations import perturbation
from aqnfx.probes.measurements import Measurements

LISTED = 10
FAR = 0.25
"""A site whose two ranks are further apart than this share of all sites is listed."""


def sqnr_record(m: Measurements, sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the ranking of sites by SQNR with that by KL at the base level, predicted where it was not measured.

    ``sites`` are the map's records per site. Returns the format, the number of sites with both, Spearman's correlation
    between the two rankings (1: the lowest SQNR costs most), and under ``misled`` the sites whose ranks (1 is worst) are
    furthest apart. Empty for noise and where fewer than three sites have both numbers.
    """
    if perturbation(m.noise_kind).format is None:
        return {}
    key = level_key(m.base_level)
    known = []
    for site in sites:
        record = site["measured"].get(key) or site["predicted"].get(key) or {}
        sqnr, kl = site.get("activations", {}).get("snr_db"), record.get("kl")
        if sqnr is not None and kl is not None and np.isfinite(sqnr) and np.isfinite(kl):
            known.append((site, float(sqnr), float(kl), bool(site["measured"].get(key))))
    if len(known) < 3:
        return {}
    sqnr, kl = (np.array([entry[i] for entry in known], dtype=np.float64) for i in (1, 2))
    by_sqnr, by_kl = rankdata(sqnr, method="min"), rankdata(-kl, method="min")
    apart = np.abs(by_sqnr - by_kl)
    order = [int(i) for i in np.argsort(-apart, kind="stable") if apart[i] > FAR * len(known)]
    constant = len(set(sqnr)) == 1 or len(set(kl)) == 1
    return {
        "format": m.noise_kind,
        "sites": len(known),
        "spearman": None if constant else float(spearmanr(-sqnr, kl).statistic),
        "far": len(order),
        "misled": [
            {
                "id": known[i][0]["id"], "sqnr_db": float(sqnr[i]), "sqnr_rank": int(by_sqnr[i]), "kl": float(kl[i]),
                "kl_rank": int(by_kl[i]), "measured": known[i][3],
            }
            for i in order[:LISTED]
        ],
    }  # fmt: skip
