"""Atomic, verified checkpoints in one layout for all strategies; the ledger of samples; attempts."""
