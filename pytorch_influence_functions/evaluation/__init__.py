"""Is it true? Retraining, and what predictions are worth beside it."""
