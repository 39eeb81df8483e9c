"""Sweeps: many training runs, compared.

Its files, in reading order:

    space           the keys that a sweep varies, their values, and the names of trials
    settings        the config of a sweep, and of each of its trials
    plan            which trial trains how far next, decided from the results so far
    sweep           learning rate x batch size, with Ray Tune
"""
