"""``battery --long``: runs of ten times the length, and how many of a tuned run's steps they are worth."""
