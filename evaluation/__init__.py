"""Measures a draft head: acceptance, speed against plain generation, and whether the text stays the target's own."""
