"""The names that Ray's providers, EC2, Compute Engine, KubeRay, Slurm and SkyPilot know.

Read from Ray 2.60.0 (`autoscaler/_private/{local,aws,gcp}`), botocore 1.44.8 (RunInstances, API
version 2016-11-15), Compute Engine v1 (google-api-python-client 2.202.0), KubeRay 1.7.0 (its CRDs),
Slurm 22.05 (`man sbatch`) and SkyPilot (`sky/utils/schemas.py`, 2026); of each only the structures
that a cluster file is likely to have. Keys inside other structures are not checked.
"""

from collections.abc import Iterator

from manta.cluster.check.documents import Document, Path_, Problem, unknown

# `aws_credentials` and `gcp_credentials` are left out: a key has no place in a file under git.
PROVIDERS = {
    "local": "type head_ip worker_ips external_head_ip",
    "aws": """
        type region availability_zone cache_stopped_nodes security_group key_pair use_internal_ips
        use_external_head_ip cloudwatch
    """,
    "gcp": "type region availability_zone project_id cache_stopped_nodes use_internal_ips",
}

# Ray adds SubnetIds, which it resolves to one SubnetId, and overwrites MinCount and MaxCount, so
# writing those would do nothing.
EC2 = {
    "node_config": """
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
    "SpotOptions": """
        BlockDurationMinutes InstanceInterruptionBehavior MaxPrice SpotInstanceType ValidUntil
    """,
    "MetadataOptions": """
        HttpEndpoint HttpProtocolIpv6 HttpPutResponseHopLimit HttpTokens InstanceMetadataTags
    """,
    "NetworkInterfaces": """
        AssociateCarrierIpAddress AssociatePublicIpAddress ConnectionTrackingSpecification
        DeleteOnTermination Description DeviceIndex EnaQueueCount EnaSrdSpecification Groups
        InterfaceType Ipv4PrefixCount Ipv4Prefixes Ipv6AddressCount Ipv6Addresses Ipv6PrefixCount
        Ipv6Prefixes NetworkCardIndex NetworkInterfaceId PrimaryIpv6 PrivateIpAddress
        PrivateIpAddresses SecondaryPrivateIpAddressCount SubnetId
    """,
    "Placement": """
        Affinity AvailabilityZone AvailabilityZoneId GroupId GroupName HostId HostResourceGroupArn
        PartitionNumber SpreadDomain Tenancy
    """,
}

COMPUTE_ENGINE = {
    "node_config": """
        advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection
        description disks displayDevice guestAccelerators hostname instanceEncryptionKey
        keyRevocationActionType labels localSsdEncryptionMode machineType metadata minCpuPlatform
        name networkInterfaces networkPerformanceConfig params privateIpv6GoogleAccess
        reservationAffinity resourcePolicies scheduling serviceAccounts shieldedInstanceConfig
        shieldedInstanceIntegrityPolicy sourceMachineImage sourceMachineImageEncryptionKey tags
        workloadIdentityConfig zone
    """,
    "disks": """
        architecture autoDelete boot deviceName diskEncryptionKey diskSizeGb forceAttach
        guestOsFeatures initializeParams interface mode savedState source type
    """,
    "initializeParams": """
        architecture description diskName diskSizeGb diskType enableConfidentialCompute labels
        licenses onUpdateAction provisionedIops provisionedThroughput replicaZones
        resourceManagerTags resourcePolicies sourceImage sourceImageEncryptionKey sourceSnapshot
        sourceSnapshotEncryptionKey storagePool
    """,
    "scheduling": """
        automaticRestart availabilityDomain exposeHostTopology gracefulShutdown
        hostErrorTimeoutSeconds instanceTerminationAction localSsdRecoveryTimeout locationHint
        maxRunDuration minNodeCpus nodeAffinities onHostMaintenance onInstanceStopAction preemptible
        preemptionNoticeDuration protectionTier provisioningModel skipGuestOsShutdown
        terminationTime
    """,
    "guestAccelerators": "acceleratorCount acceleratorType",
    "serviceAccounts": "email scopes",
    "metadata": "items",
    "networkInterfaces": """
        accessConfigs aliasIpRanges aliasIpv6Ranges enableVpcScopedDns igmpQuery
        internalIpv6PrefixLength ipv6AccessConfigs ipv6Address network networkAttachment networkIP
        nicType parentNicName queueCount serviceClassId stackType subnetwork vlan
    """,
}
NODE_CONFIG = {"aws": EC2, "gcp": COMPUTE_ENGINE, "local": {"node_config": ""}}

_CLUSTER = """
    authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec
    headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend
    tlsOptions upgradeStrategy workerGroupSpecs
"""
_POD = """
    activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy
    enableServiceLinks ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers
    hostname hostnameOverride imagePullSecrets initContainers nodeName nodeSelector os overhead
    preemptionPolicy priority priorityClassName readinessGates resourceClaims resources
    restartPolicy runtimeClassName schedulerName schedulingGates schedulingGroup securityContext
    serviceAccount serviceAccountName setHostnameAsFQDN shareProcessNamespace subdomain
    terminationGracePeriodSeconds tolerations topologySpreadConstraints volumes
"""
_CONTAINER = """
    args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe
    resizePolicy resources restartPolicy restartPolicyRules securityContext startupProbe stdin
    stdinOnce terminationMessagePath terminationMessagePolicy tty volumeDevices volumeMounts
    workingDir
"""
KUBERAY = {
    "RayCluster": "apiVersion kind metadata spec status",
    "RayJob": "apiVersion kind metadata spec status",
    "RayCluster.spec": _CLUSTER,
    "rayClusterSpec": _CLUSTER,
    "RayJob.spec": """
        activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint
        entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata
        preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes
        submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished
    """,
    "authOptions": "enableK8sTokenAuth mode secretName",
    "autoscalerOptions": """
        command args env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext
        upscalingMode version volumeMounts
    """,
    "headGroupSpec": """
        enableIngress headService ingressOptions labels rayStartParams resources serviceType
        template
    """,
    "workerGroupSpecs": """
        groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority
        rayStartParams replicas resources scaleStrategy suspend template
    """,
    "template": "metadata spec",
    "template.spec": _POD,
    "containers": _CONTAINER,
}

SBATCH = """
    account acctg-freq array batch begin bell burst-buffer chdir cluster-constraint clusters comment
    constraint container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task
    deadline delay-boot dependency distribution error exclude exclusive export export-file
    extra-node-info get-user-env gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task
    gres gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type
    mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue
    nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket
    open-mode output overcommit oversubscribe partition power prefer priority profile propagate qos
    quiet reboot requeue reservation signal sockets-per-node spread-job switches test-only
    thread-spec threads-per-core time time-min tmp tres-per-task use-min-nodes verbose wait
    wait-all-nodes wckey
"""

SKYPILOT = {
    "task": """
        name workdir num_nodes resources envs secrets file_mounts volumes setup run config service
        pool event_callback inputs outputs
    """,
    "resources": """
        infra cloud region zone accelerators accelerator_args cpus memory instance_type use_spot
        disk_size disk_tier local_disk network_tier max_hourly_cost image_id ports labels autostop
        volumes any_of ordered job_recovery priority priority_class
    """,
    "autostop": "idle_minutes down wait_for hook hook_timeout",
    "job_recovery": "strategy max_restarts_on_errors recover_on_exit_codes",
}


def problems(
    document: Document, tables: dict[str, str], structure: str, *path: str | int
) -> Iterator[Problem]:
    """The keys below a path that the structures there do not have. A structure is looked up by the
    key that holds it, or by the last two."""
    value = document.value
    for key in path:
        value = value[key]
    yield from _inside(document, tables, structure, value, path)


def _inside(
    document: Document, tables: dict[str, str], structure: str, value: object, path: Path_
) -> Iterator[Problem]:
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _inside(document, tables, structure, item, (*path, i))
    elif isinstance(value, dict) and structure in tables:
        known = tables[structure].split()
        for key, inner in value.items():
            if key not in known:
                yield document.problem(unknown(str(key), known, structure), *path, key)
                continue
            both = f"{structure}.{key}"
            yield from _inside(
                document, tables, both if both in tables else key, inner, (*path, key)
            )
