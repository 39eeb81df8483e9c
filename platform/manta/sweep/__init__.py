"""Sweeps: many training runs, compared.

Its files, in reading order:

    run             learning rate x batch size, by Ray Tune
"""
