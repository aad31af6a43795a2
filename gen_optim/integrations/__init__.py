"""Adapters to training frameworks, one file each; importing this package imports none of them.

Each framework is an extra of the same name: ``pip install 'generalized-newton[lightning]'``.
"""
