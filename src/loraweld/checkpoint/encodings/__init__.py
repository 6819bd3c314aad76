"""Encodings: how the numbers of a quantised weight are stored, a file per family. Their arithmetic: compute/codecs."""
