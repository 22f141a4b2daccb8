"""Anthropic's Messages API over the same preparation and production as chat completions."""
