"""The page of `scripts/demo.py`: images and a question, answered by the base model and by a tuned one, side by side."""
