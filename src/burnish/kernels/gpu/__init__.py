"""The GPU kernels, in Triton. `support.py` tells whether they run here; `twins.py` holds their plain torch versions."""
