"""Read, start and check what was launched: processes, strategies, Slurm jobs."""
