"""A model in memory as the source of a merge, and the methods that save it."""
