"""What goes wrong while training runs: signals, loss spikes, workers that hang."""
