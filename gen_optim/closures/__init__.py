"""Calling a closure again without leaving a trace."""
