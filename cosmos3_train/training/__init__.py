"""The doorway to lightning and wandb: a run, from its data to its last checkpoint."""
