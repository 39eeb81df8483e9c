"""Checkpoints: what is written, how, and what is there."""
