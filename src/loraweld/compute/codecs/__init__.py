"""Codecs: stored bytes → rows of numbers and back, one file per family of encodings."""
