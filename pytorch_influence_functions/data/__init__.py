"""What is a batch? Batches, samples (the only place that iterates a loader), labels, checks."""
