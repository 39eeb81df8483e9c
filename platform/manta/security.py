"""Libraries with known holes, with which Manta does not start; addresses with a secret in them."""

import re
from importlib import metadata
from urllib.parse import parse_qsl

from manta.errors import ConfigError

# The first version without the hole, and the hole.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747: reading a file of weights can run code"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: reading a Parquet file can run code"),
    "ray": ("2.54", "CVE-2026-27482"),
}

# What the address of a storage may ask for. Everything else that pyarrow takes there is a secret,
# names a person, or makes the connection less safe.
HARMLESS = ("region", "scheme", "endpoint_override", "allow_bucket_creation", "project_id")
# Pages of the web have queries of any kind; these words are in the names of secrets.
SECRET_NAME = re.compile("key|token|secret|sig|pass|pwd|cred|auth|policy", re.IGNORECASE)
SECRET_IN_ADDRESS = (
    "a password or key in an address would get into logs, configs and manifests; leave it to the "
    "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)"
)


def has_secret(text: str) -> bool:
    """Whether a text contains an address with a password, as in s3://name:password@bucket, or is an
    address whose query is not harmless, as in s3://bucket/x?secret_key=..."""
    if re.search(r"\w://[^/@\s]+:[^/@\s]+@", text):
        return True
    address = re.fullmatch(r"\s*(\w[\w+.-]*)://[^?\s]*\?(\S*)\s*", text)
    if address is None or "=" not in address[2]:  # (a ? without = is in a glob)
        return False
    names = [name for name, _ in parse_qsl(address[2], keep_blank_values=True)]
    if address[1].lower() in ("http", "https"):
        return any(SECRET_NAME.search(name) for name in names)
    return address[1].lower() != "file" and any(name not in HARMLESS for name in names)


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
