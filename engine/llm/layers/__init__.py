"""What a decoder layer is made of: one file a noun."""
