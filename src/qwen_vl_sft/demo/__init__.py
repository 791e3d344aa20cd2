"""The page of `scripts/demo.py`: a base model and a tuned one answer side by side."""
