"""Fine-tune Qwen-VL vision-language models with TRL on one GPU or many."""
