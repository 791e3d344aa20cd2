"""Model families: what differs between Qwen2-VL, Qwen2.5-VL and Qwen3-VL, a file each."""
