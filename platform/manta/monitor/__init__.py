"""What is told of a run while it trains: metrics, alerts and trackers.

Its files and its sub-room, in reading order:

    settings        the configs of alerts and trackers
    metrics         the names of all metrics; a run's figures as Ray metrics     [ray]
    figures         what a run's records say about its health
    conditions      when a run calls for help: for the webhook and for Prometheus
    alerts          which alerts are on
    webhook         sends alerts to Slack, Discord or a server of one's own
    trackers        experiment trackers, each in a process of its own
    watch           watches a run, in the process that starts its workers        [ray]
    prometheus      Prometheus' configuration and rules; starts Prometheus       [yaml]
    status          the newest figures of all runs, in a table
    board           a board for Grafana
    command         `python -m manta.monitor`
"""
