"""Memory and time of training and prediction, predicted without allocating anything."""
