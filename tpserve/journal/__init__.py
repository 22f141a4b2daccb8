"""The durable table of answers: what a frontend needs to go on with those of the one before it. No torch, no HTTP."""
