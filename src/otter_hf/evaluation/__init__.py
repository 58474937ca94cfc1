"""Benchmarks: scoring, tasks and an adapter for lmms-eval, and a few-shot harness. See `docs/evaluation.md`."""
