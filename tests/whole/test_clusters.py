"""The files in clusters/ can run only for money or on someone's machines, so all that can be
checked here is checked.

Ray's validator knows the top level of a `ray up` file, but neither `provider` nor `node_config`,
so the names there are compared with those that Ray and EC2 read, offline and without boto3.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "clusters").glob("*.yaml"))
TOKEN = "~/.ray/auth_token"

# What ray/autoscaler/_private/{local,aws} of Ray 2.60.0 reads from `provider`. It reads
# `aws_credentials` too: left out, since a key has no place in a file under git.
PROVIDER_KEYS = {
    "local": {"type", "head_ip", "worker_ips", "external_head_ip"},
    "aws": {
        *("type", "region", "availability_zone", "cache_stopped_nodes", "security_group"),
        *("key_pair", "use_internal_ips", "use_external_head_ip"),
    },
}

# The request of EC2's RunInstances (API version 2016-11-15, read from botocore 1.44.5), and of the
# structures inside it that we use. Three differences: Ray adds SubnetIds, which it resolves to one
# SubnetId, and overwrites MinCount and MaxCount, so writing those would do nothing.
EC2_KEYS = {
    "RunInstances": """
        AdditionalInfo BlockDeviceMappings CapacityReservationSpecification ClientToken CpuOptions
        CreditSpecification DisableApiStop DisableApiTermination DryRun EbsOptimized
        ElasticGpuSpecification ElasticInferenceAccelerators EnablePrimaryIpv6 EnclaveOptions
        HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior
        InstanceMarketOptions InstanceType Ipv6AddressCount Ipv6Addresses KernelId KeyName
        LaunchTemplate LicenseSpecifications MaintenanceOptions MetadataOptions Monitoring
        NetworkInterfaces NetworkPerformanceOptions Operator Placement PrivateDnsNameOptions
        PrivateIpAddress RamdiskId SecondaryInterfaces SecurityGroupIds SecurityGroups SubnetId
        SubnetIds TagSpecifications UserData
    """,
    "BlockDeviceMappings": "DeviceName Ebs NoDevice VirtualName",
    "Ebs": """
        AvailabilityZone AvailabilityZoneId DeleteOnTermination EbsCardIndex Encrypted Iops KmsKeyId
        OutpostArn SnapshotId Throughput VolumeInitializationRate VolumeSize VolumeType
    """,
    "IamInstanceProfile": "Arn Name",
    "InstanceMarketOptions": "MarketType SpotOptions",
    "MetadataOptions": """
        HttpEndpoint HttpProtocolIpv6 HttpPutResponseHopLimit HttpTokens InstanceMetadataTags
    """,
}


def unknown_ec2_keys(value: object, structure: str = "RunInstances") -> list[str]:
    """The keys in `value` that EC2 does not have in `structure`, also further inside."""
    if isinstance(value, list):
        return [key for item in value for key in unknown_ec2_keys(item, structure)]
    if not isinstance(value, dict) or structure not in EC2_KEYS:
        return []
    unknown = [f"{structure}.{key}" for key in value if key not in EC2_KEYS[structure].split()]
    return unknown + [bad for key, inner in value.items() for bad in unknown_ec2_keys(inner, key)]


def strings(value: object) -> Iterator[str]:
    """Every string in a config, keys included."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def pip_requirements(config: dict[str, Any]) -> list[Requirement]:
    """The requirements that the setup commands install. Anything but plain requirements raises."""
    commands = dict.fromkeys(config["head_setup_commands"] + config["worker_setup_commands"])
    words = [shlex.split(command) for command in commands]
    installs = [w[w.index("install") + 1 :] for w in words if "install" in w]
    return [Requirement(word) for install in installs for word in install if word[0] != "-"]


def pinned_version(requirement: Requirement) -> str | None:
    """The `1.2` of `name==1.2`; None where a newer release could be installed tomorrow."""
    match = re.fullmatch(r"==([\d.]+)", str(requirement.specifier))
    return match[1] if match else None


def project_requirements() -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "clusters" / name).read_text())


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A cluster file as `ray up` sees it: Ray's defaults fill in what the file leaves out."""
    return prepare_config(load(request.param.name))


def test_there_are_cluster_files() -> None:
    assert {"a100x8", "local"} <= {path.stem for path in FILES}


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


def test_provider_keys_exist(config: dict[str, Any]) -> None:
    provider = config["provider"]
    assert set(provider) <= PROVIDER_KEYS[provider["type"]]


def test_node_config_keys_exist(config: dict[str, Any]) -> None:
    for node_type in config["available_node_types"].values():
        assert unknown_ec2_keys(node_type["node_config"]) == []


@pytest.mark.parametrize(
    ("node_config", "unknown"),
    [
        ({"InstanceType": "m6i.xlarge", "ImageID": "ami-0"}, ["RunInstances.ImageID"]),
        ({"BlockDeviceMappings": [{"Ebs": {"VolumSize": 500}}]}, ["Ebs.VolumSize"]),
    ],
)
def test_a_misspelled_node_config_key_is_caught(
    node_config: dict[str, Any], unknown: list[str]
) -> None:
    assert unknown_ec2_keys(node_config) == unknown


def test_nothing_floats(config: dict[str, Any]) -> None:
    requirements = pip_requirements(config)
    assert requirements
    assert [str(r) for r in requirements if not pinned_version(r)] == []
    assert [s for s in strings(config) if re.search("latest|nightly", s)] == []


def test_images_are_pinned(config: dict[str, Any]) -> None:
    (ray,) = {pinned_version(r) for r in project_requirements() if r.name == "ray"}
    images = [config["docker"][key] for key in config["docker"] if key.endswith("image")]
    assert all(re.match(rf"rayproject/ray:{re.escape(str(ray))}-py311-", i) for i in images)
    if config["provider"]["type"] == "aws":
        # Without an ImageId, Ray chooses an AMI with Ubuntu 18.04.
        for node_type in config["available_node_types"].values():
            assert re.fullmatch("ami-[0-9a-f]{17}", node_type["node_config"]["ImageId"])


def test_nodes_install_what_the_project_needs(config: dict[str, Any]) -> None:
    installed = {canonicalize_name(r.name): r for r in pip_requirements(config)}
    for needed in project_requirements():
        found = installed.get(canonicalize_name(needed.name))
        assert found is not None, f"pyproject.toml needs {needed}, the nodes do not install it"
        assert needed.specifier.contains(str(pinned_version(found))), f"{found}, not {needed}"
        assert needed.extras <= found.extras, f"{found}, not {needed}"
    assert pinned_version(installed["ray"]) in {
        pinned_version(r) for r in project_requirements() if r.name == "ray"
    }


def test_only_holders_of_the_token_get_in(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {TOKEN: TOKEN}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        chmod = commands.index(f"chmod 600 {TOKEN}")
        (start,) = (i for i, command in enumerate(commands) if "ray start" in command)
        assert chmod < start
        assert "RAY_AUTH_MODE=token" in commands[start].split("ray start")[0]
    assert not any("0.0.0.0" in string for string in strings(config))


def test_ray_starts_as_head_and_as_workers(config: dict[str, Any]) -> None:
    head = config["head_start_ray_commands"][-1].split()
    assert {"--head", "--port=6379", "--dashboard-host=127.0.0.1"} <= set(head)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head  # a job that is stopped saves first
    worker = config["worker_start_ray_commands"][-1].split()
    assert "--address=$RAY_HEAD_IP:6379" in worker
    # Jobs on the head and on workers must agree where data and runs are.
    (home,) = {w for w in head + worker if w.startswith("MANTA_HOME=")}
    assert head.count(home) == worker.count(home) == 1


def test_a100x8_offers_eight_gpus_and_costs_little_when_idle() -> None:
    config = load("a100x8.yaml")
    worker = config["available_node_types"]["a100x8"]
    assert worker["node_config"]["InstanceType"] == "p4d.24xlarge"
    assert worker["resources"] == {"CPU": 96, "GPU": 8}
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert worker["min_workers"] == 0
    assert config["provider"]["cache_stopped_nodes"] is False
