"""Triton kernels of routed experts. Imported where a GPU computes, never on a CPU's path."""
