"""Which of many graphs that compute the same is fastest on a device, by measuring there: docs/tuning.md."""
