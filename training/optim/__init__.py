"""Optimizers, their parameter routing, and learning-rate schedules."""
