"""Triton kernels of a decoder's small steps. Imported where a GPU computes, never on a CPU's path."""
