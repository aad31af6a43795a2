"""Measurements of gen_optim on real data: ``python -m benchmarks``."""
