"""One rank: its device, its shard of the weights, its KV pages; executes step plans in order."""
