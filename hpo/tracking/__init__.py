"""What MLflow gets of a study: its store, a run for each trial, a summary with plots, and the UI on top.

What a trial says goes through a file on disk first, so neither a server that is down nor kill -9 loses a row.
"""
