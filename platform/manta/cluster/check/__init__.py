"""Cluster files, checked before anything costs money: `python -m manta.cluster check FILE`.

Its files, in reading order:

    documents   YAML with the line of each key; values left to fill in; names that nearly fit
    pins        the versions that nodes install, written from pyproject.toml and compared with it
    keys        the names that EC2, Compute Engine, KubeRay, Slurm and SkyPilot know
    request     what the job that will run asks for, and whether it fits
    launcher    files for `ray up`
    start       the commands in them that start Ray
    kuberay     manifests for KubeRay
    scripts     batch scripts for Slurm, tasks for SkyPilot, the image
    account     what an AWS account has, if boto3 and credentials are there
    command     takes a file of any kind, and prints all of its problems
"""
