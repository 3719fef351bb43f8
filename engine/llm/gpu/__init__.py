"""Language models on a GPU: attention through FlashInfer, decoding steps as CUDA graphs, fused kernels."""
