"""The engine that answers prompts: packed prefill, shared prefixes, and a decoding batch whose free places are refilled."""
