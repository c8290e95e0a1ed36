#!/usr/bin/env python3
"""Ask a running Prometheus every question of the dashboard, and say which of them has no data.

    python docker/check_dashboard.py --prometheus http://127.0.0.1:9090

Ends with 0 when every query returned at least one number. Needs a server that has had some requests within the window.
Knows Grafana's JSON and Prometheus's HTTP API; the standard library is all it imports.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "pronk.json"


@dataclass(frozen=True)
class Query:
    """One expression of the dashboard, as written there, with Grafana's variables in it."""

    panel: str
    legend: str
    expr: str


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel that asks something; those in a collapsed row too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panels({"panels": panel.get("panels", [])})
        else:
            yield panel


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Every expression of every panel, and the metrics that the variables list their values from."""
    for variable in dashboard["templating"]["list"]:
        listed = re.fullmatch(r"label_values\((.*), \w+\)", str(variable.get("definition", "")))
        if listed:
            yield Query(f"variable {variable['name']}", "", listed[1])
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Query(panel["title"], target.get("legendFormat", ""), target["expr"])


def expand(expr: str, window: str) -> str:
    """Put in what Grafana would: a rate window, and "all" for the variables."""
    return re.sub(r"\$__\w+", window, expr).replace("$model", ".*").replace("$instance", ".*")


def ask(prometheus: str, expr: str) -> list[float]:
    """-> the values of an instant query, without NaN. Raises OSError when Prometheus does not answer, or refuses."""
    url = f"{prometheus.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            result = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise OSError(json.load(error).get("error", str(error))) from error
    values = (float(series["value"][1]) for series in result)
    return [value for value in values if not math.isnan(value)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask a running Prometheus every question of the dashboard.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address (default: %(default)s)")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, help="a dashboard's JSON (default: ours)")
    parser.add_argument("--window", default="1m", help="the window that rates are taken over (default: %(default)s)")
    options = parser.parse_args(argv)
    every = list(queries(json.loads(options.dashboard.read_text())))
    empty = 0
    for query in every:
        try:
            values = ask(options.prometheus, expand(query.expr, options.window))
        except OSError as error:
            print(f"{query.panel} {query.legend}: {error}", file=sys.stderr)
            return 2
        empty += not values
        shown = ", ".join(f"{value:.4g}" for value in values[:6]) or "NO DATA"
        print(f"{query.panel:32} {query.legend:28} {shown}")
    print(f"{len(every)} queries, {empty} without data")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
