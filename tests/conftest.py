"""What all tests share: how much hypothesis tries, and how long it may take."""

from hypothesis import settings

settings.register_profile("gen_optim", max_examples=60, deadline=None)
settings.load_profile("gen_optim")
