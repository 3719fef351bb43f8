"""Rollouts of diffusion transformers: diffusers' models with quantized linears, solvers, samples."""
