"""Adapters to training frameworks, one file each; importing this package imports none of them.

What each needs is an extra of the distribution, of the same name.
"""
