"""A frozen base in FP8: weights of 8 bits, products of 8-bit values on GPUs that have them, and an emulation for tests."""
