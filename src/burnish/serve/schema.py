"""The requests that are understood. Every field here has an effect, and any other is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from burnish.engine.sampling import MAX_BIAS
from burnish.serve import limits


class Body(BaseModel):
    """A part of a request: no other fields, no numbers written as texts, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


TokenId: TypeAlias = Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)]
Ids: TypeAlias = Annotated[list[TokenId], Field(min_length=1, max_length=limits.MAX_TOKENS)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]
Bias: TypeAlias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
BiasKey: TypeAlias = Annotated[str, Field(pattern=r"^[0-9]{1,7}$")]
TopLogprobs: TypeAlias = Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)]
Counted: TypeAlias = Annotated[int, Field(ge=1, le=limits.MAX_TOKENS)]


class StreamOptions(Body):
    include_usage: bool = Field(False, description="A last event has the usage.")
    continuous_usage_stats: bool = Field(False, description="Every event has the usage so far.")


class Sampling(Body):
    """What both kinds of request share."""

    model: str = Field(description="The model's name, or an adapter's.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; 1 if not given.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)] | None = Field(None, description="0 keeps all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=limits.MAX_BIASES)] | None = Field(
        None, description="Token id -> number added to its logit."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="The same seed gives the same answer."
    )
    n: Annotated[int, Field(ge=1, le=limits.MAX_CHOICES)] | None = Field(None, description="Answers to each prompt.")
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the model's end tokens.")
    min_tokens: Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=limits.MAX_REGEX_CHARS)] | None = Field(
        None, description="The whole answer matches it (Rust syntax)."
    )
    grammar: Annotated[str, Field(min_length=1, max_length=limits.MAX_GRAMMAR_CHARS)] | None = Field(
        None, description="The answer is a sentence of this grammar in Lark's notation, which begins at start."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class PlainText(Body):
    type: Literal["text"]


class JsonObject(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Answers always follow the schema, whatever is said here.")


class JsonSchema(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class CompletionRequest(Sampling):
    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    max_tokens: Counted | None = Field(None, description="16 if not given.")
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: TopLogprobs | None = Field(None, description="So many likeliest tokens beside each one.")
    response_format: ResponseFormat | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is another word for system."
    )
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MAX_PARTS)]


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]


class ChatRequest(Sampling):
    messages: Messages
    max_tokens: Counted | None = Field(None, description="What the context leaves if not given.")
    max_completion_tokens: Counted | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None


class FeedbackRequest(Body):
    id: Annotated[str, Field(min_length=1, max_length=64)] = Field(description="Of the answer's JSON.")
    index: Annotated[int, Field(ge=0, lt=limits.MAX_SEQUENCES)] | None = Field(
        None, description="Of the choice; 0 if not given."
    )
    correct: bool | None = Field(None, description="Either this or expected.")
    expected: Annotated[str, Field(max_length=limits.MAX_EXPECTED_CHARS)] | None = Field(
        None, description="What the answer should have been; white space does not count."
    )


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = Field(None, description="Either this or messages.")
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="For prompt: as a completion would; true if not given.")
    add_generation_prompt: bool | None = Field(None, description="For messages; true if not given.")


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=limits.MAX_TOKENS)]
    skip_special_tokens: bool | None = Field(None, description="false if not given.")
