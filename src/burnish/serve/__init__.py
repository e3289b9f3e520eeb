"""The HTTP API in OpenAI's form: one process answers HTTP, another one runs the engine."""
