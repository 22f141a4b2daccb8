"""Open requests and the link to the ranks, shared by the HTTP frontend and the offline `LLM`. No HTTP, no torch."""
