"""Libraries with known holes are refused; secrets stay where they are."""

from importlib import metadata

import pytest

from manta import security
from manta.errors import ConfigError


def test_what_is_installed_here_is_new_enough() -> None:
    security.check_versions()


@pytest.mark.parametrize(
    ("name", "version", "is_refused"),
    [
        ("torch", "2.9.1+cu128", True),
        ("torch", "2.10.0", False),
        ("torch", "2.13.0+cpu", False),
        ("pyarrow", "14.0.0", True),
        ("pyarrow", "14.0.1", False),
        ("ray", "2.53.0", True),
        ("ray", "3.0.0.dev0", False),
    ],
)
def test_old_versions_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, is_refused: bool
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version if n == name else real(n))
    if not is_refused:
        security.check_versions()
        return
    with pytest.raises(ConfigError, match=rf"{name} .*CVE.*pip install '{name}>="):
        security.check_versions()
