"""From a dataset to conversations, and from these to token ids, labels and pixels."""
