"""What a run writes: its folder, its checkpoints, the rows of its steps and the picture of its loss."""
