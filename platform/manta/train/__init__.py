"""Training: from the config of a run to its last checkpoint, on Ray Train's workers.

Its sub-rooms and files, in reading order:

    step            the optimizer step: device, schedule, optimizer, DeepSpeed's engine
    checkpoints     what is written, how, and what is there
    faults          what goes wrong while training runs: signals, loss spikes, workers that hang
    records         what a run writes down: metrics, and where its time went
    settings        the configs of the training loop and of a run on Ray
    run             what the loop works on, and what ends it before its time
    validation      val loss and bits per byte while a run trains
    meter           how long steps took, what is written of them, and whether they are out of line
    loop            the training loop, without Ray
    plan            what a run is made of: its weights, its model, the order of its data
    build           from a config to an engine on this machine
    resume          what of a run does not change while it trains, and whether it can go on
    rollbacks       going back before a loss spike, and past the tokens that it came from
    worker          one rank: sets up the loop and runs it in Ray Train's process
    patience        what is done about workers that failed, in the process that starts them again
    supervise       Ray Train's workers, started again when they fail
    pretrain        a whole run, from the process that a person starts
"""
