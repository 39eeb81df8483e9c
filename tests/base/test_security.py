"""Security: libraries with known holes are refused, and secrets stay where they are."""

from importlib import metadata

import pytest

from manta import security
from manta.config import load
from manta.errors import ConfigError
from manta.train.settings import PretrainConfig


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


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("home=s3://me:hunter2@bucket/manta", "home"),
        ("data.source=https://me:hunter2@example.com/a.txt", "data.source"),
        ("data.decontaminate=[a.txt,s3://me:hunter2@b/c]", "data.decontaminate.1"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(argument: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: a password.*AWS_SECRET_ACCESS_KEY") as caught:
        load(PretrainConfig, [argument])
    assert "hunter2" not in str(caught.value)


def test_addresses_without_a_password_are_fine() -> None:
    for source in ("s3://bucket/a:b@c", "hf:owner/name", "file:///a/b:c@d"):
        assert load(PretrainConfig, [f"data.source={source}"]).data.source == source
