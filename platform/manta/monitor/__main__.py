"""Watch this machine's Ray with Prometheus: is it going well?

    python -m manta.monitor [key=value ...]
    make monitor

Writes Prometheus' configuration, alert rules and a board for Grafana into HOME/monitor, and starts
Prometheus on 127.0.0.1 if it is installed. Once it runs, the same command prints a table of the
runs that train now, with their alerts. Alerts need none of this: give a run alerts.webhook=.
"""

from manta.job import run_job, say
from manta.monitor.command import MonitorConfig, monitor


def main(config: MonitorConfig) -> None:
    monitor(config, say)


if __name__ == "__main__":
    run_job(main, MonitorConfig)
