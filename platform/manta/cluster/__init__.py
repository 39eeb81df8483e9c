"""Ray clusters: one to join or to start, and what is in it.

Its files, in reading order:

    authentication  the token that a cluster asks for
    connection      joins a cluster, or starts one for this job alone
    capacity        whether the workers that a job asks for fit
    head            Ray's head node on this machine
    check           cluster files, checked before anything costs money
"""
