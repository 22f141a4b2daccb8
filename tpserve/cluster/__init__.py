"""How nodes and ranks find each other, and how a node notices that another one is gone. No torch, no policy."""
