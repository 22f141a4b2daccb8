"""Operators' commands for a running server: `tpserve status` and `tpserve report`."""
