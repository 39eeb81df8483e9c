"""Scaling laws: how the loss falls with model size and tokens, and what that predicts.

Its files, in reading order:

    ladder_settings  config of a ladder
    settings       settings of a study
    points         runs as points, from a CSV file or from the runs themselves
    fit            the law, and its intervals by bootstrap
    isoflop        the parabola at equal compute, and its bias
    powers         the best rate and batch, and how they grow with compute
    predictions    a prediction, filed before the run that tests it, and checked after
    pictures       fit, residuals, iso-FLOP curves and best sizes
    ladder         the runs of a ladder: sizes, budgets, stable runs and the decays that leave them
    climbing       what of a ladder is left to train, for the lanes of a sweep
    training       trains it, and says what it costs
    backtest       the law of the runs of less compute, held against those of the most
    misfit         size and tokens that help more, or less, together than the law has it
    recommend      what to train next: size, tokens, rate, batch; the run of a prediction
    study          the law: points, fit, recommendation, prediction
    coordinates    how activations grow with the width in the first steps
    transfer       what a learning rate of one width is worth at others, as tables and pictures
    answer         the whole
"""
