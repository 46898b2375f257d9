"""What runs all the time: the model pool, the HTTP endpoint, and the cluster under them."""
