"""Scaling laws: how the loss falls with model size and tokens, and what that predicts.

Its files, in reading order:

    settings       settings of a study
    points         runs as points, from a CSV file or from the runs themselves
    fit            the law, and its intervals by bootstrap
    isoflop        the parabola at equal compute, and its bias
    powers         the best rate and batch against compute
    predictions    a prediction, filed before the run that tests it, and checked after
    pictures       fit, residuals, iso-FLOP curves and best sizes
    study          the whole
"""
