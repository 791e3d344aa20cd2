"""Score base, prompted and tuned on the same rows, and report."""
