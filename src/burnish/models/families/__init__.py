"""One file per family of models: its config's dialect and its weight map, as torch-free data."""
