"""Hyperparameter search for PyTorch that people trust."""

__version__ = "0.1.0"
