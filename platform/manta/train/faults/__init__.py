"""What goes wrong while training runs: signals, loss spikes, workers that hang.

Its files, in reading order:

    signals         signals that reach one rank from outside and concern all ranks
    stopping        signals that stop a run, and the time that Ray gives a job to save
    spikes          losses and gradients that are far above the run's recent past
    watchdog        ends a rank that makes no progress, and keeps its stacks
"""
