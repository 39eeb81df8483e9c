"""Whether an AWS account has what a file for `ray up` names: calls that only read."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from manta.cluster.check.documents import Document, Problem
from manta.cluster.check.launcher import is_spot

# Service Quotas counts running machines in vCPUs, by family and by how they are paid for.
FAMILIES = {
    ("p", False): ("L-417A185B", "on-demand P instances"),
    ("p", True): ("L-7212CCBC", "spot P instances"),
    ("g", False): ("L-DB2E81BA", "on-demand G and VT instances"),
    ("g", True): ("L-3819A6DF", "spot G and VT instances"),
}
OTHERS = {
    False: ("L-1216C47A", "on-demand standard instances"),
    True: ("L-34B43A48", "spot standard instances"),
}


class Account:
    """An AWS account in one region, as boto3's clients show it. `client` makes one by its name."""

    def __init__(self, client: Callable[[str], Any]):
        self._client = client
        self.unread: list[str] = []

    def problems(self, document: Document) -> Iterator[Problem]:
        """What the file names and the account does not have. What may not be read (no leave, no
        network) goes to `unread`, a line each."""
        config = document.value
        types: dict[str, Any] = config["available_node_types"]
        for name, it in types.items():
            node, at = it["node_config"], ("available_node_types", name, "node_config")
            for key, check in (
                ("ImageId", self._image),
                ("IamInstanceProfile", self._profile),
                ("InstanceType", self._offered),
            ):
                if key in node and (text := self._asked(f"{name}: {key}", check, node[key])):
                    yield document.problem(f"{name}: {text}", *at, key)
        yield from self._quotas(document, types)

    def bucket(self, home: str) -> str | None:
        """What is wrong with the bucket of a home such as s3://bucket/folder; None if nothing."""
        if not home.startswith("s3://"):
            return None
        name = home.removeprefix("s3://").partition("/")[0]
        return self._asked(f"bucket {name}", self._bucket, name)

    def _asked(self, what: str, check: Callable[[Any], str | None], value: Any) -> str | None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return check(value)
        except ClientError as e:
            code = str(e.response.get("Error", {}).get("Code", ""))
            if "NotFound" in code or "NoSuch" in code or "Malformed" in code or code == "404":
                return f"{e.response['Error'].get('Message') or code}"
            self.unread.append(f"{what} ({code})")
        except BotoCoreError as e:
            self.unread.append(f"{what} ({type(e).__name__})")
        return None

    def _image(self, image: str) -> str | None:
        found = self._client("ec2").describe_images(ImageIds=[image])["Images"]
        state = found[0].get("State", "available") if found else "missing"
        return None if state == "available" else f"the image {image} is {state} in this region"

    def _profile(self, profile: dict[str, str]) -> None:
        name = profile.get("Name") or profile.get("Arn", "").rpartition("/")[2]
        self._client("iam").get_instance_profile(InstanceProfileName=name)

    def _bucket(self, name: str) -> str | None:
        from botocore.exceptions import ClientError

        try:
            self._client("s3").head_bucket(Bucket=name)
        except ClientError as e:
            if e.response["Error"]["Code"] == "404":
                return f"there is no bucket {name}"
            raise
        return None

    def _offered(self, kind: str) -> str | None:
        filters = [{"Name": "instance-type", "Values": [kind]}]
        found = self._client("ec2").describe_instance_type_offerings(Filters=filters)
        return None if found["InstanceTypeOfferings"] else f"this region has no {kind}"

    def _quotas(self, document: Document, types: dict[str, Any]) -> Iterator[Problem]:
        """Families of machines whose quota is below the most that the file may start."""
        wanted: dict[tuple[str, str], int] = {}
        at: dict[tuple[str, str], str] = {}
        head = document.value.get("head_node_type")
        most = document.value.get("max_workers", 0)
        for name, it in types.items():
            kind = it["node_config"].get("InstanceType", "")
            vcpus = self._vcpus(kind) if kind else None
            if not vcpus:
                continue
            spot = is_spot(it["node_config"])
            quota = FAMILIES.get((kind[:1], spot), OTHERS[spot])
            n = 1 if name == head else min(it.get("max_workers", most), most)
            wanted[quota] = wanted.get(quota, 0) + n * vcpus
            at[quota] = name
        for (code, family), vcpus in wanted.items():
            text = self._asked(f"quota for {family}", self._quota, (code, family, vcpus))
            if text:
                place = ("available_node_types", at[code, family])
                yield document.problem(text, *place)

    def _vcpus(self, kind: str) -> int | None:
        sizes: list[int] = []

        def look(kind: str) -> None:
            found = self._client("ec2").describe_instance_types(InstanceTypes=[kind])
            sizes.extend(it["VCpuInfo"]["DefaultVCpus"] for it in found["InstanceTypes"])

        self._asked(f"size of {kind}", look, kind)
        return sizes[0] if sizes else None

    def _quota(self, wanted: tuple[str, str, int]) -> str | None:
        code, family, vcpus = wanted
        quotas = self._client("service-quotas")
        has = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        if has >= vcpus:
            return None
        return (
            f"up to {vcpus} vCPUs of {family}, and the account's quota is {math.floor(has)} "
            f"(Service Quotas, {code}): ask AWS for more"
        )


def connect(region: str) -> Account | str:
    """The account of the credentials that are here, or why it is not looked at."""
    try:
        import boto3
        import botocore.config
    except ImportError:
        return "boto3 is not installed (pip install -e '.[cloud]')"
    session = boto3.Session(region_name=region)
    if session.get_credentials() is None:
        return "there are no AWS credentials in this environment"
    brief = botocore.config.Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 2})
    return Account(lambda name: session.client(name, config=brief))
