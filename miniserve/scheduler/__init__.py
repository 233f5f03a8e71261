"""Requests → `StepPlan`: admission, chunked prefill, preemption, block pool, prefix cache. Pure Python, no torch."""

from miniserve.scheduler.limits import check_lengths
from miniserve.scheduler.scheduler import Scheduler

__all__ = ["Scheduler", "check_lengths"]
