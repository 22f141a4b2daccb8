"""The HTTP frontend: the application, access rules and the process that serves them. No torch."""
