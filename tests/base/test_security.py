"""Security: libraries with known holes are refused, and secrets stay where they are."""

from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.configs import refusal, write
from manta import security
from manta.config import load
from manta.errors import ConfigError
from manta.storage import HomeConfig
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
        ("home=s3://bucket/x?secret_key=hunter2", "home"),
        ("data.source=https://example.com/a.txt?X-Amz-Signature=hunter2", "data.source"),
        ("data.mix={s3://me:hunter2@b/c: 1}", "data.mix"),
        ("data.source=https://me:hunter2@example.com/a.txt", "data.source"),
        ("data.decontaminate=[a.txt,s3://me:hunter2@b/c]", "data.decontaminate.1"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(argument: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: a password.*AWS_SECRET_ACCESS_KEY") as caught:
        load(PretrainConfig, [argument])
    assert "hunter2" not in str(caught.value)


def test_the_home_of_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_HOME", "s3://bucket/x?secret_key=hunter2")
    with pytest.raises(ConfigError, match=r"^MANTA_HOME: a password") as caught:
        HomeConfig().home_folder  # noqa: B018
    assert "hunter2" not in str(caught.value)


@given(
    st.sampled_from(["s3", "gs", "abfs", "hdfs", "s3fs"]),
    st.sampled_from(["secret_key", "access_key", "client_secret", "kerb_ticket", "user", "x"]),
    st.sampled_from(["", "region=us-east-1&"]),
)
def test_what_an_address_asks_for_is_harmless_or_refused(s: str, name: str, before: str) -> None:
    assert security.has_secret(f"{s}://bucket/x?{before}{name}=1")
    assert not security.has_secret(f"{s}://bucket/x?{before}".rstrip("&?"))


@pytest.mark.parametrize("name", ["oc.env:PATH", "oc.decode:1", "file:/etc/passwd", "a:1"])
def test_a_config_cannot_read_what_is_outside_of_it(name: str, tmp_path: Path) -> None:
    for text in (f"name: ${{{name}}}", f"sample: {{prompts: ['a ${{{name}}}']}}"):
        assert "is not computed in a config" in refusal(write(tmp_path, text))
    assert "is not computed in a config" in refusal(f"seed=${{{name}}}")
    escaped = write(tmp_path, "sample: {prompts: ['\\${oc.env:PATH}', '${name}']}\nname: a")
    assert load(PretrainConfig, [escaped]).sample.prompts == ("${oc.env:PATH}", "a")


def test_addresses_without_a_password_are_fine() -> None:
    for source in (
        "s3://bucket/a:b@c", "hf:owner/name", "file:///a/b:c@d", "file:///a?b=c", "s3://b/x-?.txt",
        "https://example.com/watch?v=4",
    ):  # fmt: skip
        assert load(PretrainConfig, [f"data.source={source}"]).data.source == source
