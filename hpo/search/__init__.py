"""The study: what to try next, what to stop early, and the database that remembers it.

The only room that imports optuna.
"""
