"""Many adapters at a time: slots that hold them, batches of rows that use them, a pool that loads them."""
