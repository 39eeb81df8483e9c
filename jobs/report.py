"""Report a run: what was trained on what, what it cost, and what came of it, as one web page.

python jobs/report.py run=my-run
python jobs/report.py run=my-run price_per_hour=32.77 out=report.html

report.json, next to the page, has each number with the file and the key that it comes from.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from manta.job import run_job
from manta.report.report import ReportConfig, report


def main(config: ReportConfig) -> None:
    out, made = report(config)
    print("\n".join(made.lines))
    print(f"written to {out}: open it in a browser")
    print(f"next: python jobs/compare.py runs=[{config.run}] compares it with others")


if __name__ == "__main__":
    run_job(main, ReportConfig)
