"""The engine as HTTP and `LLM` use it: open requests, and the link to the ranks. No torch."""
