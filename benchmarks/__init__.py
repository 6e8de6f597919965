"""Timings that anyone can rerun: `python -m benchmarks.NAME`. Findings, negatives too, stand in LOG.md."""
