"""Model families: their differences, and nothing else."""
