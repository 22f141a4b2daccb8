"""The process of one node that starts the ranks, watches them and starts a rank again that died: torch's elastic agent."""
