"""Hypothesis profiles: `pytest tests/scheduling --hypothesis-profile long` runs 10,000 traces each instead of the usual."""

from hypothesis import HealthCheck, settings

settings.register_profile("long", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
