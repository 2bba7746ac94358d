"""`toolkit serve`: a run's model answers over HTTP, many requests in one forward pass."""
