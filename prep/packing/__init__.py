"""Lengths → bins: the packing planner. Pure numpy and numba, no I/O."""
