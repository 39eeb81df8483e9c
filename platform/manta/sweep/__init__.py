"""Sweeps: many training runs, compared.

Its files, in reading order:

    space             the keys that a sweep varies, their values, and the names of trials
    search_settings   what a sweep varies, how it searches, how far its trials train
    settings          the config of a sweep, and of each of its trials
    search            which settings are tried next
    optuna_search     which settings Optuna's TPE suggests next                   [optuna]
    schedulers        how far each trial trains: to its end, ASHA, PBT
    journal           what was decided, a line each, so that a sweep goes on after a kill
    identity          whether a config continues the sweep of a journal
    plan              which trial trains how far next, decided from the results so far
    rehearsal         a plan without training: what a sweep will cost, and tests of plans
    sweep             learning rate x batch size, with Ray Tune
"""
