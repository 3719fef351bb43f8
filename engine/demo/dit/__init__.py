"""`rollmill demo dit`: a small diffusion transformer of digits, Flow-GRPO, quantized rollouts and a swap a step."""
