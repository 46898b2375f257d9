"""The HTTP side, without Ray: one model behind the protocols that clients speak."""
