"""Export a merged model to GGUF, or quantized with compressed-tensors, and compare its answers with the original's."""
