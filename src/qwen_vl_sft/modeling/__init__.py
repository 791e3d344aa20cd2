"""Load and adapt the base model: quantization, LoRA, attention, kernels, FLOPs."""
