"""The name under which Ray's dashboard lists a job."""

import json
import os
from typing import Any

import manta

# The key by which the dashboard's list of jobs is filtered.
NAME = "job_name"


def job_config(name: str | None) -> Any:
    """Ray's JobConfig for a job of this name, for `ray.init`."""
    from ray.job_config import JobConfig

    return JobConfig(metadata=_metadata(name) if name else None)


def name_submitted(name: str | None) -> None:
    """Gives the job that `ray job submit` started this process for its name, unless the person who
    submitted it gave one (`--metadata-json`). Any other job has the name of its JobConfig."""
    if not name or (key := _record()) is None:
        return
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(key, namespace="job")
    if found is None:
        return
    record = json.loads(found)
    record["metadata"] = _metadata(name) | (record.get("metadata") or {})
    internal_kv._internal_kv_put(key, json.dumps(record), overwrite=True, namespace="job")


def _metadata(name: str) -> dict[str, str]:
    return {NAME: name, "manta": manta.__version__}


def _record() -> str | None:
    """The key of Ray's record of the submitted job that this process belongs to, if it does."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
    from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient

    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    number = submitted.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    return JobInfoStorageClient.JOB_DATA_KEY.format(job_id=number) if number else None
