"""How nodes and ranks find each other and notice that one is gone. No torch, no policy."""
