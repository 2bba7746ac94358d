"""How processes start. Standard library only, so that it runs where torch is not installed."""
