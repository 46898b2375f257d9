"""What happens to an image: storage, shards, decode, model, lanes, output. Free of Ray."""

__version__ = "0.1.0"
