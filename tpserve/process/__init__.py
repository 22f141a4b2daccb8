"""Processes of this host: facts, signals, and the thread that speaks for a rank. No torch, no policy."""
