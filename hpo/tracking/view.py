"""How MLflow's UI shows a study: its table of trials and its charts, as a view that is stored with the experiment.

It is what the UI's "share" button stores, in an experiment tag that no document describes (read in MLflow 3.17.2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpo.config import Direction

VIEW_NAME = "hpo"
"""The saved view that every study's experiment has."""

VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"
FRONT_TAG = "hpo.front"

_TRIALS = "tags.`hpo.kind` = 'trial'"
_SECTION = "learning-curves"
_NUM_IN_PARALLEL = 8  # parameters whose axes can be distinguished at 1 400 pixels


def study_view(metric: str, direction: Direction, parameters: Sequence[str], costs: Sequence[str]) -> str:
    """The trials without the summary, the best first: state, value and costs, then the parameters; and three charts.

    `parameters` come in tuning priority. The charts are training and validation loss in one, the metric, and parallel
    coordinates of all trials.
    """
    measured = [f"metrics.`best/{metric}`", *(f"metrics.`cost/{name}`" for name in costs)]
    front = [f"tags.`{FRONT_TAG}`"] if costs else []
    columns = ["tags.`hpo.state`", *front, *measured, *(f"params.`{name}`" for name in parameters)]
    return json.dumps(
        {
            "searchFilter": _TRIALS,
            "orderByKey": measured[0],
            "orderByAsc": direction is Direction.MINIMIZE,
            "selectedColumns": columns,
            "columnOrder": columns,
            "runsHiddenMode": "SHOWALL",
            "isAccordionReordered": True,  # or the sections would be sorted by name
            "compareRunSections": [
                {"uuid": _SECTION, "name": "Learning curves", "display": True, "isReordered": False}
                | {"deleted": False, "isGenerated": False, "columns": 2, "cardHeight": 360}
            ],
            "compareRunCharts": [
                _line_chart("loss", "train/loss", "val/loss"),
                _line_chart("metric", f"val/{metric}"),
                _parallel_coordinates(metric, parameters[:_NUM_IN_PARALLEL]),
            ],
        }
    )


def _line_chart(name: str, *metrics: str) -> dict[str, Any]:
    return _chart(name, "LINE") | {
        "metricKey": metrics[0],
        "selectedMetricKeys": list(metrics),
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
    }


def _parallel_coordinates(metric: str, parameters: Sequence[str]) -> dict[str, Any]:
    return _chart("parallel", "PARALLEL") | {
        "selectedMetrics": [f"best/{metric}"],
        "selectedParams": list(parameters),
        "showAllRuns": True,
    }


def _chart(name: str, kind: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "type": kind,
        "metricSectionId": _SECTION,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
