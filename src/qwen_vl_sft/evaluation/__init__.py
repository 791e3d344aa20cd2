"""Base, prompted and tuned on the same rows: their answers, their scores and the report."""
