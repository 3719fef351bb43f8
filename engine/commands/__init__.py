"""Commands of `rollmill`: a file each, with `add` (its arguments) and `run`."""
