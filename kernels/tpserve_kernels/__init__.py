"""Triton kernels beside their torch references. This package knows torch and triton only, nothing of the server."""
