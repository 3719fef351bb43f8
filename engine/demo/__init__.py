"""`rollmill demo`: a small policy, a small task, a real RL loop on quantized rollouts."""
