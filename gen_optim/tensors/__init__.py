"""Lists of parameter-shaped tensors, DTensors, and random streams."""
