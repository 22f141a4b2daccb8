"""Which ranks take part in which epoch, and why an epoch ends. No HTTP, no requests, no torch."""
