"""A finished merge in the formats of other runtimes."""
