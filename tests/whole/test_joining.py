"""What a job says to a cluster that it joins, and what the cluster's dashboard says of the job."""

import json
import sys
from pathlib import Path

import pytest
from ray._private.utils import check_version_info

from helpers.alone import alone, run
from manta.cluster import connection

JOIN = """
import sys
from manta.cluster import connection
from manta.errors import MantaError
try:
    connection.connect(name=sys.argv[1])
    print("joined")
except MantaError as e:
    print(sys.argv[1], e)
"""
# Makes the cluster one of other versions, as far as those who join can know.
OLDER = """
import json
from manta.cluster import connection
connection.connect()
from ray._private import ray_constants
from ray.experimental import internal_kv
where = (b"CLUSTER_METADATA", ray_constants.KV_NAMESPACE_CLUSTER)
found = json.loads(internal_kv._internal_kv_get(where[0], namespace=where[1]))
found |= {"ray_version": "2.59.1", "python_version": "3.12.9"}
internal_kv._internal_kv_put(where[0], json.dumps(found), overwrite=True, namespace=where[1])
"""
LIST = """
import json
from ray.job_submission import JobSubmissionClient
jobs = JobSubmissionClient("http://127.0.0.1:8265").list_jobs()
print("jobs", json.dumps([[job.type, job.metadata] for job in jobs]))
"""
SCRIPT = f"""
{sys.executable} -m manta.cluster up
python join.py plain
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
ray job submit -- python join.py submitted >log 2>&1
ray job submit --metadata-json '{{"job_name": "mine"}}' -- python join.py other >log 2>&1
python list.py
export RAY_ADDRESS=127.0.0.1:6379
mkdir -p wrong/.ray none
printf %064d 7 >wrong/.ray/auth_token
chmod 600 wrong/.ray/auth_token
HOME=$PWD/wrong python join.py wrong
HOME=$PWD/none python join.py none
HOME=$PWD/none RAY_AUTH_MODE=disabled python join.py off
python older.py
python join.py versions
"""


@alone
@pytest.mark.long
def test_a_cluster_lists_jobs_by_their_names_and_refuses_in_one_line(short: Path) -> None:
    lines = run(short, SCRIPT, join=JOIN, older=OLDER, list=LIST)
    said = dict(line.split(" ", 1) for line in lines if " " in line)
    assert {"jobs", "wrong", "none", "off", "versions"} <= set(said), lines
    jobs = {(kind, metadata.get("job_name")) for kind, metadata in json.loads(said["jobs"])}
    assert {("DRIVER", "plain"), ("SUBMISSION", "submitted"), ("SUBMISSION", "mine")} <= jobs
    for refused in ("wrong", "none", "off"):
        assert "token" in said[refused] and "RAY_AUTH_MODE" in said[refused], lines
    assert said["versions"].startswith(
        "the Ray at 127.0.0.1:6379 runs on Python 3.12.9 and Ray 2.59.1, this job on Python 3.11."
    )


def test_rays_words_about_other_versions_are_understood() -> None:
    theirs = {"ray_version": "2.59.1", "python_version": "3.12.9"}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(theirs, "node 10.0.0.1")
    said = connection.other_versions(str(caught.value))
    assert said is not None and said.startswith("Python 3.12.9 and Ray 2.59.1, this job on Python ")
    assert connection.other_versions("The current node timed out during startup.") is None
