"""Lists of parameter-shaped tensors, DTensors, and random number streams."""
