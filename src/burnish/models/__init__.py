"""One decoder for every family, the families' records, and reading and writing of checkpoints."""
