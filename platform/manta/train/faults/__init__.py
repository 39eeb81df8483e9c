"""What goes wrong while training runs: signals, loss spikes, workers that hang.

Its files, in reading order:

    signals         what reaches one rank from outside and concerns all
    spikes          losses and gradients that are out of line with the run's own past
    watchdog        the end of a rank that makes no progress, with its stacks kept
"""
