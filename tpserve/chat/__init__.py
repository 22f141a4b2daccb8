"""`tpserve chat`: a conversation with a running server in the terminal, or one question through a pipe. Never loads torch."""
