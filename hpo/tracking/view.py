"""How MLflow's UI shows a study: its table of trials and its charts, as views that are stored with the experiment.

They are what the UI's "share" button stores, in experiment tags that no document describes (read in MLflow 3.17.2).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpo.config import Direction

TRIALS_VIEW, CURVES_VIEW = "hpo", "hpo-curves"
"""The saved views that every study's experiment has: all trials, and the same with charts of the best ones alone."""

NUM_CURVES = 10
"""Trials in the charts of the view of curves; MLflow offers 10 and 20."""

FRONT_TAG = "hpo.front"

_TRIALS = "tags.`hpo.kind` = 'trial'"
_CURVES, _PARAMETERS = "learning-curves", "parameters"
_NUM_IN_PARALLEL = 8  # parameters whose axes can be distinguished at 1 400 pixels


def view_tags(metric: str, direction: Direction, parameters: Sequence[str], costs: Sequence[str]) -> dict[str, str]:
    """The trials without the summary, the best first: state, value and costs, then the parameters; and three charts.

    `parameters` come in tuning priority. The charts are training and validation loss in one, the metric, and parallel
    coordinates of all trials.
    """
    view = _view(metric, direction, parameters, costs)
    of_best = {**view, "runsHiddenMode": f"FIRST_{NUM_CURVES}_RUNS"}
    views = {TRIALS_VIEW: view, CURVES_VIEW: of_best}
    return {f"mlflow.sharedViewState.{name}": json.dumps(each) for name, each in views.items()}


def view_address(experiment_id: str, view: str) -> str:
    """Where the UI shows a view of an experiment, after the server's address.

    The kind of workflow must be named: without it MLflow opens what the browser showed last, at first its traces.
    """
    mode = "&compareRunsMode=CHART" if view == CURVES_VIEW else ""
    return f"/#/experiments/{experiment_id}/runs?viewStateShareKey={view}&workflowType=machine_learning{mode}"


def _view(metric: str, direction: Direction, parameters: Sequence[str], costs: Sequence[str]) -> dict[str, Any]:
    measured = [f"metrics.`best/{metric}`", *(f"metrics.`cost/{name}`" for name in costs)]
    front = [f"tags.`{FRONT_TAG}`"] if costs else []
    columns = ["tags.`hpo.state`", *front, *measured, *(f"params.`{name}`" for name in parameters)]
    return {
        "searchFilter": _TRIALS,
        "orderByKey": measured[0],
        "orderByAsc": direction is Direction.MINIMIZE,
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # or the sections would be sorted by name
        "compareRunSections": [
            _section(_CURVES, "Learning curves", columns=2),
            _section(_PARAMETERS, "Parameters", columns=1),  # or the names of the axes would overlap
        ],
        "compareRunCharts": [
            _line_chart("loss", "train/loss", "val/loss"),
            _line_chart("metric", f"val/{metric}"),
            _parallel_coordinates(metric, parameters[:_NUM_IN_PARALLEL]),
        ],
    }


def _section(uuid: str, name: str, *, columns: int) -> dict[str, Any]:
    described = {"uuid": uuid, "name": name, "columns": columns, "cardHeight": 360, "display": True}
    return {**described, "isReordered": False, "deleted": False, "isGenerated": False}


def _line_chart(name: str, *metrics: str) -> dict[str, Any]:
    return _chart(name, "LINE", _CURVES) | {
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
    return _chart("parallel", "PARALLEL", _PARAMETERS) | {
        "selectedMetrics": [f"best/{metric}"],
        "selectedParams": list(parameters),
        "showAllRuns": True,
    }


def _chart(name: str, kind: str, section: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "type": kind,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
