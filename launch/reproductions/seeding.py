"""Draws of a network that are not the draws of its task."""

from __future__ import annotations

import torch

from modeling.initializers import keyed_generator


def seed_network(seed: int) -> None:
    """Seed torch's own generator by SHA-256 of (`seed`, "network").

    Tasks draw from generators seeded with `seed` itself: a network of the same draws, in the same shape, would start as the task's keys.
    """
    torch.manual_seed(keyed_generator(seed, "network").initial_seed())
