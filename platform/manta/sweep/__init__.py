"""Sweeps: many training runs, compared."""
