"""`python -m manta.cluster up`: Ray's head node on this machine."""

import sys

from manta.cluster import head
from manta.errors import ClusterError, MantaError
from manta.terminal import message


def main(arguments: list[str]) -> None:
    """Does what the arguments ask for.

    Raises:
        ClusterError: they ask for nothing that there is, or it fails.
    """
    match arguments:
        case ["up"]:
            head.up()
        case _:
            raise ClusterError("usage: python -m manta.cluster up")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MantaError as e:
        print(f"error: {message(e)}", file=sys.stderr)
        sys.exit(2)
