"""Benchmarks: `python -m benchmarks.NAME`; the last line of stdout is one JSON object, progress goes to stderr."""
