"""Experts on CUDA have no backward yet, and are refused."""

from __future__ import annotations

from typing import NoReturn

from bi_patch.errors import UnsupportedFeature


def _refuse(*_) -> NoReturn:
    raise UnsupportedFeature("training.experts: the trainer has no experts on CUDA. Train the model on CPU")


route = route_backward = experts = experts_backward = _refuse
