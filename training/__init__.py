"""What the three doors share: flags, process groups, checkpoints, logs."""
