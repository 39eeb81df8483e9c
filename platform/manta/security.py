"""The oldest safe versions of libraries: Manta does not start with one that has a known hole."""

from importlib import metadata

from manta.errors import ConfigError

# The first version without the hole, and the hole.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747: reading a file of weights can run code"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: reading a Parquet file can run code"),
    "ray": ("2.54", "CVE-2026-27482"),
}


def check_versions() -> None:
    """Raises ConfigError if a library is older than its floor."""
    for name, (floor, hole) in FLOORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # benchmarks of the model run without Ray
        if _numbers(found) < _numbers(floor):
            raise ConfigError(
                f"{name} {found} has a known hole ({hole}): pip install '{name}>={floor}'"
            )


def _numbers(version: str) -> list[int]:
    """2.13.0+cpu -> [2, 13, 0]"""
    parts = version.partition("+")[0].split(".")
    return [int(part) for part in parts if part.isdecimal()]
