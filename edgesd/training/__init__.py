"""Training: one loop, the embedded model's recipe, and the recovery of pruned checkpoints."""
