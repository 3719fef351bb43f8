"""What files of diffusion transformers look like, made canonical at the border."""

from .stored_transformer import StoredTransformer, open_transformer

__all__ = ["StoredTransformer", "open_transformer"]
