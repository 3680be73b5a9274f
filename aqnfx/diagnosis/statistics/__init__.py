"""Statistics of a diagnosis: samples to estimates with intervals, rankings, windows, thresholds and records."""
