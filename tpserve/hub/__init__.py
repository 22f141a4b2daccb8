"""Repository ids to directories: what is needed of a repository, fetched once."""
