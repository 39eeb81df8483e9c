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
    work              a segment in the hands of a lane: its checks before, its result after
    lanes             the driver's end of lanes: workers that stay, and train segment by segment
    running           gives a plan's segments to lanes, until it is over or somebody stops it
    opening           the beginning of a sweep or a ladder: all that can be wrong, then its lock
    costs             what runs in lanes cost: before, once it is measured, and after
    naming            settings in words
    compared          settings with their seeds, and the best ones against the others
    optimum           the rate at which the loss would be lowest
    importance        how much each key explains
    extending         the commands that go on with a sweep: more seeds, values beyond an edge
    findings          all that was found, in sentences
    results           the ranking, and the best trial as a config
    pictures          losses against rates, maps, curves
    page              the sweep as one web page
    sweep             a sweep from its start to its ranking
"""
