"""The cost of GeNOptimizer in time, memory and moves of parameters, next to the least that it could cost."""
