"""FlashInfer: what the installed one offers, how it quantizes activations, and which of its tactics may serve."""
