"""One file a wire."""
