"""Processes of this host: facts from the kernel, signals, and a rank's control thread. No torch, no policy."""
