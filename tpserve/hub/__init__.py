"""From a repository id to a directory on this node: which files, which commit, one download per cache. No torch."""
