"""Manta trains, sweeps and evaluates GPT models from scratch on Ray."""

__version__ = "0.1.0"
