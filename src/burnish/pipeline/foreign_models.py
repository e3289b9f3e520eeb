"""Exported models run by the program they were exported for, with the two methods that comparing models needs.

"Hidden" states are the logits themselves: these programs give nothing earlier.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish._optional import require

# B sequences, T tokens, V vocabulary


class LlamaCppModel:
    """A GGUF file in llama.cpp, through the package llama-cpp-python.

    Args:
        window: most tokens of a sequence.

    Raises:
        ImportError: the package is not installed; no extra brings it, as it is compiled where it is installed.
        OSError, RuntimeError, ValueError: llama.cpp cannot be loaded, or cannot load the file.
    """

    def __init__(self, path: Path, *, window: int, threads: int | None = None) -> None:
        library: Any = import_module("llama_cpp")
        self._llama = library.Llama(
            model_path=str(path), n_ctx=window, n_batch=window, logits_all=True, n_threads=threads, verbose=False
        )

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Logits, (B, T, V) float32; every sequence runs on its own."""
        rows = []
        for tokens in tokens_BT.tolist():
            self._llama.reset()
            self._llama.eval(tokens)
            rows.append(torch.from_numpy(np.array(self._llama.scores[: len(tokens)], dtype=np.float32)))
        return torch.stack(rows)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class CTranslate2Model:
    """A CTranslate2 folder.

    Raises:
        MissingExtraError: ctranslate2 is not installed.
        RuntimeError, ValueError: it cannot load the folder.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._library: Any = require("ctranslate2", extra="ct2")
        self._generator = self._library.Generator(str(folder), device="cpu", intra_threads=threads or 0)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Logits, (B, T, V) float32."""
        view = self._generator.forward_batch(tokens_BT.tolist(), return_log_probs=False)
        return torch.from_numpy(np.array(view.to(self._library.DataType.float32)))

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden
