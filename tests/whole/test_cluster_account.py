"""What `check` asks AWS for, answered by botocore's Stubber: calls that only read."""

from typing import Any

import pytest

from helpers.common import ROOT
from manta.cluster.check.account import Account, connect
from manta.cluster.check.documents import Document, load

session = pytest.importorskip("botocore.session", reason="needs boto3 (pip install -e '.[cloud]')")
stub = pytest.importorskip("botocore.stub")

SESSION = session.get_session()  # one, since it reads the services' descriptions once
KINDS = {"m6i.xlarge": 4, "m6i.8xlarge": 32, "p4d.24xlarge": 96}


class Cloud:
    """Clients of an account that has everything but what a test takes from it."""

    def __init__(self) -> None:
        self.clients: dict[str, Any] = {}
        self.stubs: dict[str, Any] = {}
        for name in ("ec2", "iam", "s3", "service-quotas"):
            self.clients[name] = SESSION.create_client(
                name, region_name="us-west-2", aws_access_key_id="a", aws_secret_access_key="b"
            )
            self.stubs[name] = stub.Stubber(self.clients[name])
            self.stubs[name].activate()

    def answers(self, without: str = "") -> None:
        """Queues the answers to all that `check` asks for about a100x8.yaml, in its order."""
        ec2, iam = self.stubs["ec2"], self.stubs["iam"]
        for kind in KINDS:
            if without == "image" and kind == "p4d.24xlarge":
                ec2.add_client_error("describe_images", "InvalidAMIID.NotFound", "no such image")
            else:
                ec2.add_response("describe_images", {"Images": [{"State": "available"}]})
            if without == "profile" and kind == "p4d.24xlarge":
                iam.add_client_error("get_instance_profile", "NoSuchEntity", "no such profile")
            elif without == "leave":
                iam.add_client_error("get_instance_profile", "AccessDenied", "not for you")
            else:
                iam.add_response("get_instance_profile", {"InstanceProfile": PROFILE})
            offered = (
                [] if without == "kind" and kind == "p4d.24xlarge" else [{"InstanceType": kind}]
            )
            ec2.add_response("describe_instance_type_offerings", {"InstanceTypeOfferings": offered})
        for vcpus in KINDS.values():
            size = {"InstanceTypes": [{"VCpuInfo": {"DefaultVCpus": vcpus}}]}
            ec2.add_response("describe_instance_types", size)
        for code, value in (
            ("L-1216C47A", 64.0),
            ("L-417A185B", 0.0 if without == "quota" else 96.0),
        ):
            self.stubs["service-quotas"].add_response(
                "get_service_quota",
                {"Quota": {"Value": value}},
                {"ServiceCode": "ec2", "QuotaCode": code},
            )


PROFILE = {
    "Path": "/",
    "InstanceProfileName": "manta-worker",
    "InstanceProfileId": "A" * 20,
    "Arn": "arn:aws:iam::1:instance-profile/manta-worker",
    "CreateDate": "2026-01-01T00:00:00Z",
    "Roles": [],
}


def a100x8() -> Document:
    (document,) = load((ROOT / "clusters" / "a100x8.yaml").read_text())
    return document


@pytest.mark.parametrize(
    ("without", "key", "said"),
    [
        ("", "", ""),
        ("image", "ImageId", "a100x8: no such image"),
        ("profile", "IamInstanceProfile", "a100x8: no such profile"),
        ("kind", "InstanceType", "this region has no p4d.24xlarge"),
        (
            "quota",
            "a100x8",
            "up to 96 vCPUs of on-demand P instances, and the account's quota is 0",
        ),
    ],
)
def test_what_an_account_lacks_is_said_with_its_line(without: str, key: str, said: str) -> None:
    cloud = Cloud()
    cloud.answers(without)
    account = Account(cloud.clients.__getitem__)
    document = a100x8()
    found = list(account.problems(document))
    assert len(found) == bool(said) and account.unread == []
    for problem in found:
        assert said in problem.text
        path = ("available_node_types", "a100x8")
        assert problem.line == document.at(
            *path, *(["node_config", key] if key != "a100x8" else [])
        )
    for it in cloud.stubs.values():
        it.assert_no_pending_responses()


def test_what_may_not_be_read_is_no_problem_and_is_said() -> None:
    cloud = Cloud()
    cloud.answers("leave")
    account = Account(cloud.clients.__getitem__)
    assert list(account.problems(a100x8())) == []
    assert account.unread == [
        f"{name}: IamInstanceProfile (AccessDenied)" for name in ("head", "cpu", "a100x8")
    ]


@pytest.mark.parametrize(
    ("code", "said"), [("404", "there is no bucket mine"), ("403", None), (None, None)]
)
def test_the_bucket_of_the_home(code: str | None, said: str | None) -> None:
    cloud = Cloud()
    if code:
        cloud.stubs["s3"].add_client_error("head_bucket", code)
    else:
        cloud.stubs["s3"].add_response("head_bucket", {}, {"Bucket": "mine"})
    account = Account(cloud.clients.__getitem__)
    assert account.bucket("s3://mine/manta") == said
    assert account.unread == (["bucket mine (403)"] if code == "403" else [])
    assert account.bucket("/shared/manta") is None


def test_without_credentials_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert connect("us-west-2") == "there are no AWS credentials in this environment"
