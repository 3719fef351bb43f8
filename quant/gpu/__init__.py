"""Triton kernels: what runs on Hopper at the speed of memory. Imported where a GPU computes, never on a CPU's path."""
