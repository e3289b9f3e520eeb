"""Jobs of many prompts: submitted, worked off by any number of workers, collected. Torch-free but for the engine."""
