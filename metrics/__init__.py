"""Metrics of speculative decoding for the `evaluate` library, one file each: `evaluate.load("metrics/<name>.py")`.

`evaluate` copies a file that it loads into a cache of its own, so that each stands alone and imports nothing of ours.
"""
