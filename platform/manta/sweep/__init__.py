"""Sweeps: many training runs, compared.

Its files, in reading order:

    sweep           learning rate x batch size, with Ray Tune
"""
