"""What runs a batch: requests, the scheduler, pages of keys and values, the runner and its graphs, text."""
