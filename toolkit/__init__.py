"""A distributed training toolkit for large models: one recipe, the same numbers, from one CPU to many GPU nodes."""

import gc

GARBAGE_THRESHOLD = gc.get_threshold()
"""Python's own; a recipe goes back to it when all is imported."""

# What torch, transformers and datasets make when they are imported stays, and the garbage collector would look through
# it again and again: a quarter of the time that the imports take.
gc.set_threshold(20_000, 50, 100)
