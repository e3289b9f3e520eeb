"""Memory and time, predicted before anything runs. No torch in this room."""
