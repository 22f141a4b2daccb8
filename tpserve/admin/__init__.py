"""What operators ask a server: `tpserve status` and `tpserve report`."""
