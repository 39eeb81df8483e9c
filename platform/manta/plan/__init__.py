"""What a run will take, before it begins: memory, hours, storage, dollars, loss.

Its files, in reading order:

    settings        the config: that of the run, and what only the plan needs
    prices          prices of machines, from a dated file
    machines        the devices: this machine's, or those of a cluster's file
    work            the work of a step, as numbers that a calibration turns into seconds
    calibration     how fast a machine does each kind of work, kept in the home
    probe           real steps on this machine
    speed           how fast it will train: by a probe, the calibration or a stated MFU
    goodput         what failures and checkpoints cost
    duration        how long it takes, with evaluations, saves and failures
    expected_loss   the loss that a scaling law expects
    show            the plan as lines
    plan            `plan`, which puts it together
"""
