"""Figures of a study and of a check, drawn by matplotlib."""
