"""What each panel of the dashboard shows, asked of a Prometheus: for where there is no Grafana.

scripts/board http://127.0.0.1:9090
"""

import json
import sys
from pathlib import Path

import httpx

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
VARIABLES = {"$instance": ".*", "$model_name": ".*", "$__rate_interval": "1m"}


def dashboard_queries() -> list[tuple[str, str]]:
    """Return the title of its panel and the query, for each query of the dashboard."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/arriero.json").read_text("utf-8"))
    return [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def fill_in(query: str, rate_interval: str = VARIABLES["$__rate_interval"]) -> str:
    """Put every server and model, and an interval, in the place of Grafana's variables."""
    for name, value in (VARIABLES | {"$__rate_interval": rate_interval}).items():
        query = query.replace(name, value)
    return query


def ask(client: httpx.Client, query: str) -> list[float]:
    """Return the figures of a query now; none while Prometheus starts, and NaN is no figure."""
    try:
        response = client.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if response.status_code == 503:
        return []
    assert response.status_code == 200, response.text
    values = [float(each["value"][1]) for each in response.json()["data"]["result"]]
    return [value for value in values if value == value]


def main(url: str) -> int:
    """Print a line a query; returns how many have no figure."""
    missing = 0
    with httpx.Client(base_url=url) as client:
        for title, query in dashboard_queries():
            values = ask(client, fill_in(query))
            missing += not values
            shown = ", ".join(f"{value:.4g}" for value in values[:6]) or "NOTHING"
            sys.stdout.write(f"{title:30} {shown:32} {query}\n")
    sys.stdout.write(f"{missing} without a figure\n")
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) > 0)
