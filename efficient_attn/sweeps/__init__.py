"""Many runs: the cells of a table, or of a grid of one's own, trained and scored by a pool of processes or by Slurm."""
