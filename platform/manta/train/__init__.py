"""Training: schedule, optimizer, engine, checkpoints, the loop, and the loop inside Ray Train."""
