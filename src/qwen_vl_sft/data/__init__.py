"""Turn datasets into conversations, and these into token ids, labels and pixels."""
