"""Evaluation: lm-eval's tasks on a saved checkpoint."""
