"""The optimizer step: device, schedule, optimizer, and the DeepSpeed engine."""
