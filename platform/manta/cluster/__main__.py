"""Ray's head node on this machine, and cluster files:

python -m manta.cluster up                      starts a head node here
python -m manta.cluster check FILE [key=value]  checks a cluster file, and whether a job fits
python -m manta.cluster pins                    writes the versions that nodes install
"""

import sys

from manta.cluster import head
from manta.errors import ClusterError, MantaError
from manta.terminal import message


def main(arguments: list[str]) -> int:
    """Does what the arguments ask for; returns the exit code.

    Raises:
        ClusterError: they ask for nothing that there is, or it fails.
    """
    match arguments:
        case ["up"]:
            head.up()
        case ["check", path, *job]:
            from manta.cluster.check.command import check

            return check(path, job)
        case ["pins"]:
            from manta.cluster.check import pins

            changed = pins.write()
            print(f"written: {', '.join(changed)}" if changed else "nothing has changed")
        case _:
            raise ClusterError(
                "usage: python -m manta.cluster up | check FILE [the job's arguments] | pins"
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MantaError as e:
        print(f"error: {message(e)}", file=sys.stderr)
        sys.exit(2)
