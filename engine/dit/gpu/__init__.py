"""What diffusion transformers compute between their linears, in few launches on a GPU."""
