"""The shared trainer: a generator of epochs, and the parts that a step and an epoch are made of.

It knows neither the study that asked for the training nor the store that remembers it.
"""
