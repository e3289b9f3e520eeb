"""Where a run's parameters, figures and files are sent while it runs. Knows nothing of models."""
