"""KV pages of routed models, and the channel between scheduler and workers."""
