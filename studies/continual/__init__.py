"""The continual study: five tasks that pretraining has not seen, every method at a rate of its own."""
