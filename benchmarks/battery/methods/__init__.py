"""The methods that are compared: bare optimizers, our own rules, and the learning-rate-free optimizers of others."""

from __future__ import annotations

from benchmarks.battery.methods.method import Method
from benchmarks.battery.methods.ours import BARE_AND_OURS, OURS, code_fingerprint
from benchmarks.battery.methods.peers import PEERS

METHODS: dict[str, Method] = {each.name: each for each in (*BARE_AND_OURS, *PEERS)}
"""All methods by name."""

__all__ = ["METHODS", "OURS", "PEERS", "Method", "code_fingerprint"]
