"""What a run will take, before it: the real engine on a model without weights."""
