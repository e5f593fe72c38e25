"""Decoding with an EAGLE-3 draft: read `decoder.py` first."""

from .decoder import generate

__all__ = ["generate"]
