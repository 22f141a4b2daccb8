"""OpenAI's Responses API over the same preparation and production as chat completions."""
