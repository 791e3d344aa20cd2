"""Put rows into batches: their order, padded batches, and packed micro-batches."""
