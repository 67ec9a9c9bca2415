"""The autoregressive attention: its branches, its routing and its cache."""
