"""Writes what Prometheus and Grafana need into the home, and starts Prometheus."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from manta import foreign, layout, storage
from manta.config import Port, config
from manta.errors import ClusterError, ConfigError, DataError
from manta.monitor import board, prometheus
from manta.monitor.prometheus import HOST
from manta.monitor.status import status
from manta.monitor.watch import ray_folder
from manta.storage import HomeConfig

WRITTEN = "written.json"  # sha256 of each file as it was written here
GRAFANA = "http://127.0.0.1:3000"


@config
class MonitorConfig(HomeConfig):
    """The monitoring of this machine's Ray."""

    port: Port = prometheus.PORT
    """Port of Prometheus on 127.0.0.1."""
    start: bool = True
    """Whether to start Prometheus; false: only write the files."""
    ray_folder: str | None = None
    """Folder in which Ray keeps its sessions; null: that of the Ray on this machine (/tmp/ray, or
    $RAY_TMPDIR/ray)."""


def monitor(c: MonitorConfig, say: Callable[[str], None]) -> None:
    """Writes the files, starts Prometheus, and says where everything is.

    Raises:
        ClusterError: the port is another program's, or Prometheus does not start.
        ConfigError: the files cannot be written.
    """
    folder = _folder(c.home_folder, say)
    rays = Path(c.ray_folder or ray_folder())
    files = _files(folder, rays, c.port)
    changed = _write(folder, files, say)
    say(f"written: {folder} (Prometheus' configuration and rules, Grafana's board)")
    if not c.start:
        return
    if prometheus.program() is None:
        say(f"Prometheus is not installed: {prometheus.install_hint()}; then run this again")
        say("alerts work without it: give a run alerts.webhook=https://...")
        return
    address = f"http://{HOST}:{c.port}"
    kept = folder / "prometheus.pid"
    if prometheus.is_taken(c.port):
        if not _is_ours(kept, c.port):
            raise ClusterError(
                f"port {c.port} on {HOST} is another program's (perhaps another Prometheus): give "
                "port=9091, or let that Prometheus read "
                f"{folder / 'prometheus.yml'} and {folder / 'rules.yml'}"
            )
        if changed:
            prometheus.reload(int(kept.read_text()))
        say(f"Prometheus is running: {address}\n")
        for line in status(address):
            say(line)
        say("")
    else:
        number = prometheus.start(folder, folder / "prometheus.yml", c.port)
        kept.write_text(str(number))
        say(f"started Prometheus: {address} (`kill {number}` ends it)")
    say(f"alerts       {address}/alerts")
    say(f"board        `grafana server --config {folder}/grafana/grafana.ini`, then {GRAFANA}")
    say(
        "Ray's dashboard shows both where its head was started with "
        f"RAY_PROMETHEUS_HOST={address} RAY_GRAFANA_HOST={GRAFANA}"
    )


def _write(folder: Path, files: dict[str, str], say: Callable[[str], None]) -> bool:
    """Writes the files; one that a person has changed stays as it is. Returns whether any of them
    is another than before."""
    list_file, remedy = folder / WRITTEN, "free some space there, or give another home="
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, DataError):  # (there may be none yet)
        found = foreign.read_json(str(list_file), dict[str, str], DataError)
    changed = False
    for name, content in files.items():
        file, new = folder / name, storage.sha256_of(content.encode())
        old = storage.sha256_of(file.read_bytes()) if file.exists() else None
        if old not in (None, new, found.get(name)):
            say(f"{file} was changed by hand and stays; delete it to have it written again")
            continue
        found[name] = new
        if old != new:
            with storage.writing(str(file), remedy):
                storage.write_bytes(str(file), content.encode())
            changed = True
    with storage.writing(str(list_file), remedy):
        storage.write_json(str(list_file), found)
    return changed


def _folder(home: str, say: Callable[[str], None]) -> Path:
    """The local folder for the files."""
    if storage.is_local(home):
        return Path(storage.filesystem(layout.monitor_folder(home))[1])
    local = layout.monitor_folder(storage.absolute("~/manta"))
    say(f"Prometheus cannot write to {home}: its files are in {local}")
    return Path(local)


def _files(folder: Path, rays: Path, port: int) -> dict[str, str]:
    """The content of each file, by its path in the folder."""
    if "\n" in str(folder) or "\n" in str(rays):
        raise ConfigError(f"{folder}: Prometheus takes no folder with a line break in its name")
    discovery = str(rays / "prom_metrics_service_discovery.json")
    grafana = board.provisioning(
        str(folder / "grafana"),
        f"http://{HOST}:{port}",
        str(rays / "session_latest" / "metrics" / "grafana" / "dashboards"),
    )
    return {
        "prometheus.yml": prometheus.configuration(discovery, str(folder / "rules.yml")),
        "rules.yml": prometheus.rules(),
        **{f"grafana/{name}": content for name, content in grafana.items()},
    }


def _is_ours(kept: Path, port: int) -> bool:
    """Whether the Prometheus at the port is the one that this command started."""
    try:
        return prometheus.is_ready(port) and prometheus.is_of(int(kept.read_text()), kept.parent)
    except (OSError, ValueError):
        return False
