"""HF checkpoints in and out, read and placed shard by shard."""
