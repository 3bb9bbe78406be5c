"""One HTML file about a study, to read, to share and to keep: `hpo report`. Needs the extra `report` (plotly).

No Optuna, no MLflow and no torch: it is made from what `Content` reads of a study.
"""
