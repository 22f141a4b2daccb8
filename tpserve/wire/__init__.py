"""Messages between processes: frames (`codec`), ZeroMQ channels (`channels`), keys for TCP (`curve`). No torch, no policy."""
