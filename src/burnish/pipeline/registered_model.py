"""What MLflow loads a registered model with: the module that its MLmodel file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.data.tokenizer import Tokenizer
from burnish.engine.sampling import SamplingParams
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import RequestError
from burnish.models.adapter_files import is_adapter_folder, read_adapter_config
from burnish.models.resolve import resolve_model
from burnish.pipeline.api import Engine


class RegisteredModel:
    """Answers rows of prompts, as MLflow's `predict` hands them over.

    Args:
        folder: of a model or an adapter, as it was logged.
    """

    def __init__(self, folder: Path) -> None:
        base = folder
        if is_adapter_folder(folder):
            base = resolve_model(str(read_adapter_config(folder)["base_model_name_or_path"]))
        tokenizer: Tokenizer | None = load_tokenizer(base)
        self._chats = tokenizer is not None and tokenizer.chat_template is not None
        self._engine = Engine(str(folder))

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Answer each row's `prompt`; returns a table with `text`.

        Args:
            model_input: a pandas table with the column `prompt`.
            params: `max_tokens`, `temperature` (0 is greedy), `seed`, and `chat`: put each prompt into the model's chat
                template, if it has one.

        Raises:
            RequestError: there is no such column, or a value is out of range.
        """
        import pandas

        given = params or {}
        if "prompt" not in model_input:
            raise RequestError("the input has no column prompt", got=list(model_input))
        prompts = [str(text) for text in model_input["prompt"]]
        sampling = SamplingParams(
            max_tokens=int(given.get("max_tokens", 128)),
            temperature=float(given.get("temperature", 0.0)),
            seed=int(given.get("seed", 0)),
        )
        asked: list[Any] = prompts
        if self._chats and given.get("chat", True):
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers = [output.text for output in self._engine.generate(asked, sampling)]
        return pandas.DataFrame({"text": answers})


def _load_pyfunc(path: str) -> RegisteredModel:
    """MLflow's hook: the folder's files are in `path`."""
    return RegisteredModel(Path(path))
