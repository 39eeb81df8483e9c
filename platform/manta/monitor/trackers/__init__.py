"""Experiment trackers that a run feeds, each in a process of its own: whatever a tracker's library
prints, waits for or breaks, training goes on.

Its files, in reading order:

    tracker         starts a tracker's process, and passes a run's records on to it
    process         what that process does
    wandb_run       a run in Weights & Biases           [wandb]
    mlflow_run      a run in MLflow                     [mlflow]
    trackio_run     a run in Trackio                    [trackio]
"""
