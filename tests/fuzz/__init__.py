"""Mutated inputs of every kind: each gives a result or one sentence. `python -m fuzz --help` runs many of them."""
