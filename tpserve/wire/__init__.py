"""Floor 1: what crosses between processes, and how it can go wrong. No torch, no policy."""
