"""Model families: what differs between Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, a file each."""
