"""The battery: many small workloads, tuned baselines and peers, for learning-rate-free training.

``python -m benchmarks battery --help``. To add a workload, write one function in ``workloads/`` under the decorator
``@workload``; to add a method, one entry in ``methods.py`` or ``peers.py``.
"""
