"""The language model: decoder, attention, sampling, generation; one file a family in `models`."""
