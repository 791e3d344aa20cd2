"""One question at a time, answered as a stream."""
