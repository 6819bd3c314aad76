"""Proof of an output: it is read again and compared with what planning says should be there, in float64.

Nothing here uses the kernels or the rounding that wrote an output; `expected` evaluates each edit a second time. What
is shared is planning (what should be there) and the decoders of encodings (`compute/codecs`).
"""
