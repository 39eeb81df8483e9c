"""`python -m manta`: the installed version, and where to begin."""

import argparse

import manta


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m manta",
        description="Manta trains, sweeps and evaluates GPT models from scratch on Ray.",
        epilog="The commands are the jobs: python jobs/pretrain.py --help, and others in jobs/.",
    )
    parser.add_argument("--version", action="version", version=f"manta {manta.__version__}")
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
