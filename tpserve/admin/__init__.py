"""Operators' commands for a running server: what it tells, and what it is asked to do."""
