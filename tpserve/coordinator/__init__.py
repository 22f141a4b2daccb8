"""Which ranks take part, in which epoch, and why it ended. No torch."""
