"""A distributed training toolkit for large models: one recipe, the same numbers, from one CPU to many GPU nodes."""
