"""One file a kernel family."""
