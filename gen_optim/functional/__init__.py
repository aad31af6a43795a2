"""Pure functions of parameters by name: the loss along a direction, its slope and its curvature."""
