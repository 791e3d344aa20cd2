"""Write and read run folders and checkpoints: manifests, rotation, and what a resume must check."""
