"""Many adapters at a time: slots on the device, batches with an adapter for each row, and a pool of adapter files."""
