"""Ray clusters: one to join or to start, and what is in it.

Its files, in reading order:

    authentication  the token that a cluster asks for
    starting        starts Ray's processes, again if they were not up in time
    lifeline        ends a job whose own Ray has died, with a line that says so
    dashboard       the name that Ray's dashboard shows of a job
    ending          signals that end a process, without leaving anything behind
    connection      joins a cluster, or starts one for this job alone
    capacity        whether the workers that a job asks for fit
    nodes           whether all nodes see the same files, and have what they promise
    spot            a cloud's notice that a machine goes, for Ray; a script by itself
    head            Ray's head node on this machine
    check           cluster files, checked before anything costs money
"""
