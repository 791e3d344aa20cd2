"""Adapter and base into one model, and the proofs that it is the one that was trained."""
