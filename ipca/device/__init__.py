"""The GPU of this machine: whether every kernel is right on it, and which configuration and backend are fastest."""
