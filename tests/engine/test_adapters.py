"""Each request is answered with its own adapter, in one batch, as a model with that adapter alone answers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.compress.optimised_layers import quantize_in_place
from burnish.engine.async_engine import AsyncEngine
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.errors import CheckpointError, ConfigError, RequestError
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder
from burnish.train.adapter import load_adapter, save_adapter
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
Native = Callable[..., NativeEngine]
MakePrompts = Callable[..., list[list[int]]]


def made_adapter(base: Decoder, folder: Path, *, seed: int, **settings: Any) -> Path:
    """An adapter that changes much, saved for `base`."""
    model = _copy(base)
    attach_lora(model, LoraConfig(**{"rank": 4, "alpha": 8, **settings}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.15, generator=generator)
    save_adapter(model, folder, base="org/tiny")
    return folder


def _copy(decoder: Decoder) -> Decoder:
    copy = Decoder(decoder.config)
    copy.load_state_dict(decoder.state_dict())
    return copy.eval()


def tokens_of(outputs: Any) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def alone(decoder: Decoder, prompts: list[list[int]], params: SamplingParams = PARAMS) -> list[tuple[int, ...]]:
    """What a decoder answers by itself."""
    return tokens_of(NativeEngine(decoder, backend="torch", speculation="off").generate(prompts, params))


@pytest.fixture
def saved(decoder: Decoder, tmp_path: Path) -> dict[str, Path]:
    """Three adapters of the tiny decoder: another rank each, other targets, another scaling."""
    return {
        "all": made_adapter(decoder, tmp_path / "all", seed=1),
        "some": made_adapter(
            decoder, tmp_path / "some", seed=2, rank=7, target_modules=("k_proj", "o_proj", "up_proj", "down_proj")
        ),
        "stable": made_adapter(decoder, tmp_path / "stable", seed=3, rank=1, rank_stabilized=True),
    }


@pytest.fixture
def written(decoder: Decoder, tmp_path: Path) -> Path:
    """The tiny decoder as a folder."""
    from burnish.models.saving import save_decoder

    save_decoder(decoder, tmp_path / "base", source=None)
    return tmp_path / "base"


def expected_of(
    decoder: Decoder, saved: dict[str, Path], names: list[str | None], prompts: list[list[int]]
) -> list[tuple[int, ...]]:
    answers: dict[str | None, list[tuple[int, ...]]] = {}
    for name in set(names):
        model = _copy(decoder)
        if name is not None:
            load_adapter(model, saved[name])
        answers[name] = alone(model.eval(), prompts)
    return [answers[name][index] for index, name in enumerate(names)]


@pytest.mark.parametrize("eager", [False, True])
def test_mixed_batch_equals_each_adapter_alone(
    decoder: Decoder, written: Path, saved: dict[str, Path], native: Native, make_prompts: MakePrompts, eager: bool
) -> None:
    names = [None, "all", "some", "stable", "all", None, "stable", "some"]
    prompts = make_prompts(8, seed=3, longest=50)
    expected = expected_of(decoder, saved, names, prompts)
    assert len(set(expected)) == 8
    assert expected[1] != expected_of(decoder, saved, [None] * 8, prompts)[1], "the test would prove nothing"
    engine = native(written, adapters=saved, max_num_seqs=5, max_batch_tokens=23, eager=eager)
    assert tokens_of(engine.generate(prompts, PARAMS, adapter=names)) == expected
    assert engine.stats().adapters == ("all", "some", "stable")
    assert engine.stats().adapter_bytes > 0


def test_prefixes_are_shared_within_an_adapter_only(
    decoder: Decoder, written: Path, saved: dict[str, Path], native: Native, make_prompts: MakePrompts
) -> None:
    [prompt] = make_prompts(1, seed=4, shortest=48, longest=48)
    names: list[str | None] = [None, "all", "some", None, "all", "some"]
    engine = native(written, adapters=saved, max_num_seqs=2)
    expected = expected_of(decoder, saved, names, [prompt] * 6)
    found = [tokens_of(engine.generate([prompt], PARAMS, adapter=name))[0] for name in names]
    assert found == expected
    assert engine.stats().prefix_hit_tokens == 3 * 32


def test_pefts_adapters_give_pefts_tokens_for_every_family(
    tiny: Any, tmp_path: Path, native: Native, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(4, seed=5, shortest=3, longest=20)
    conv1d = tiny.name == "gpt2"
    expected: list[tuple[int, ...]] = []
    adapters = {}
    with contextlib.redirect_stderr(io.StringIO()):
        for seed, name in enumerate(("first", "second")):
            settings = peft.LoraConfig(
                r=3 + seed, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=seed == 1,
                fan_in_fan_out=conv1d,
            )  # fmt: skip
            base = type(tiny.model).from_pretrained(tiny.folder, dtype=torch.float32).eval()
            model = peft.get_peft_model(base, settings).eval()
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key:
                        parameter.normal_(0, 0.5, generator=generator)
            model.save_pretrained(tmp_path / name)
            adapters[name] = tmp_path / name
            merged = model.merge_and_unload()
            merged.generation_config = tiny.model.generation_config
            expected += [
                type(tiny)(name, tiny.folder, merged)._generate(one, 10) for one in prompts[2 * seed : 2 * seed + 2]
            ]
    engine = native(tiny.folder, adapters=adapters)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    names = ["first", "first", "second", "second"]
    assert tokens_of(engine.generate(prompts, params, adapter=names)) == expected
    plain = tokens_of(engine.generate(prompts, params))
    assert plain == [tiny.greedy(prompt, 10) for prompt in prompts]
    assert plain != expected, "the test would prove nothing"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_adapters_over_quantized_weights(
    written: Path, saved: dict[str, Path], native: Native, make_prompts: MakePrompts, quantize: str
) -> None:
    prompts = make_prompts(6, seed=6)
    model = load_decoder(written)
    quantize_in_place(model, quantize=quantize)
    load_adapter(model, saved["all"])
    ask = SamplingParams(max_tokens=1, logprobs=5)
    expected = list(NativeEngine(model.eval(), backend="torch").generate(prompts, ask))
    engine = native(written, quantize=quantize, weights_cache=False, adapters=saved)
    found = list(engine.generate(prompts, ask, adapter="all"))
    plain = list(engine.generate(prompts, ask))
    differences, changes = [], []
    for mine, theirs, base in zip(found, expected, plain):
        ours, wanted, without = (dict(one.logprobs[0].top) for one in (mine, theirs, base))  # type: ignore[index]
        differences += [abs(ours[token_id] - wanted[token_id]) for token_id in ours.keys() & wanted.keys()]
        changes += [abs(without[token_id] - wanted[token_id]) for token_id in without.keys() & wanted.keys()]
    assert sum(differences) / len(differences) < 0.1
    assert sum(changes) / len(changes) > 0.3


def test_adapters_come_and_go_while_it_runs(
    decoder: Decoder, written: Path, saved: dict[str, Path], native: Native, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(3, seed=7, shortest=20)
    wanted = {name: expected_of(decoder, saved, [name] * 3, prompts) for name in saved}
    engine = native(written, max_num_seqs=4)
    with pytest.raises(RequestError, match=r"there is no adapter 'x'.*none, as the engine has no adapters"):
        engine.submit(prompts[0], PARAMS, adapter="x")
    engine.add_adapter("x", saved["all"])
    engine.add_adapter("y", saved["some"])
    assert tokens_of(engine.generate(prompts, PARAMS, adapter="x")) == wanted["all"]
    running = engine.submit(prompts[0], PARAMS, adapter="x")
    engine.step()
    with pytest.raises(ConfigError, match="x is in use"):
        engine.remove_adapter("x")
    engine.abort(running)
    engine.remove_adapter("x")
    with pytest.raises(RequestError, match=r"there is no adapter 'x'.*one of y"):
        engine.generate(prompts, PARAMS, adapter="x")
    # Another adapter takes its place and its name: nothing that is cached may be taken for its own.
    engine.add_adapter("x", saved["stable"])
    found = engine.generate(prompts, PARAMS, adapter=["x", "y", "x"])
    assert tokens_of(found) == [wanted["stable"][0], wanted["some"][1], wanted["stable"][2]]
    engine.remove_adapter("y")
    engine.remove_adapter("x")
    assert (engine.stats().adapters, engine.stats().adapter_bytes) == ((), 0)
    assert tokens_of(engine.generate(prompts, PARAMS)) == alone(decoder, prompts)


def test_request_made_before_its_adapter_went_is_refused_when_it_begins(written: Path, saved: dict[str, Path]) -> None:
    engine = NativeEngine(written, adapters={"x": saved["all"]})
    outputs = engine.generate([[5, 6]], PARAMS, adapter="x")
    engine.remove_adapter("x")
    with pytest.raises(RequestError, match="there is no adapter"):
        next(outputs)
    assert engine.scheduler.idle


def test_a_decoder_that_is_handed_in_computes_as_before(
    decoder: Decoder, saved: dict[str, Path], make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(2, seed=8)
    before = alone(decoder, prompts)
    names = list(decoder.state_dict())
    engine = NativeEngine(decoder, adapters=saved)
    assert tokens_of(engine.generate(prompts, PARAMS, adapter="all")) != before
    assert alone(decoder, prompts) == before
    assert list(decoder.state_dict()) == names
    del engine
    import gc

    gc.collect()
    assert not any(module._forward_hooks for module in decoder.modules())


def test_streams_and_several_answers_take_an_adapter(
    decoder: Decoder, written: Path, saved: dict[str, Path], native: Native
) -> None:
    [expected] = expected_of(decoder, saved, ["all"], [[5, 6, 7]])
    engine = native(written, adapters=saved)
    events = list(engine.stream([5, 6, 7], PARAMS, adapter="all"))
    assert sum((event.token_ids for event in events), ()) == expected
    params = SamplingParams(max_tokens=12, ignore_eos=True, n=2)
    [output] = engine.generate([[5, 6, 7]], params, adapter="all")
    assert [choice.token_ids for choice in output.choices] == [expected] * 2


def test_output_layer_is_adapted_on_torch_and_refused_by_the_kernels(
    decoder: Decoder, written: Path, tmp_path: Path, make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(4, seed=9)
    saved = {"head": made_adapter(decoder, tmp_path / "head", seed=5, target_modules=("q_proj", "lm_head"))}
    names: list[str | None] = ["head", None, "head", None]
    engine = NativeEngine(written, dtype="float32", adapters=saved, max_batch_tokens=19)
    assert engine.stats().backend == "torch"
    expected = expected_of(decoder, saved, names, prompts)
    assert tokens_of(engine.generate(prompts, PARAMS, adapter=names)) == expected
    engine = NativeEngine(written, dtype="float32")
    if engine.stats().backend == "cpu":
        with pytest.raises(ConfigError, match="cannot run an adapter of lm_head"):
            engine.add_adapter("head", saved["head"])
        assert engine.stats().adapters == ()
        assert tokens_of(engine.generate(prompts, PARAMS)) == alone(decoder, prompts)
        with pytest.raises(ConfigError, match="adapter changes the output layer"):
            NativeEngine(written, dtype="float32", backend="cpu", adapters=saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"bias": "all"}, "bias is not supported"),
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"lora_alpha": 0}, "must be positive"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(
    written: Path, saved: dict[str, Path], change: dict[str, Any], message: str
) -> None:
    path = saved["all"] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        NativeEngine(written, adapters=saved)


def test_adapters_of_another_base_and_broken_ones_are_refused(
    decoder: Decoder, written: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    engine = NativeEngine(written, adapters=saved)
    other = Decoder(decoder.config).initialize(std=0.4, seed=99).eval()
    with pytest.raises(ConfigError, match=r"made for org/tiny and does not fit .*: the weights of .* differ"):
        engine.add_adapter("other", made_adapter(other, tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="there is an adapter all already"):
        engine.add_adapter("all", saved["some"])
    with pytest.raises(ConfigError, match="needs a name"):
        engine.add_adapter("", saved["some"])
    with pytest.raises(ConfigError, match=r"there is no adapter nobody.*one of all, some, stable"):
        engine.remove_adapter("nobody")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        engine.add_adapter("new", tmp_path / "nothing")
    broken = _copy(decoder)
    attach_lora(broken, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        lora_parameters(broken)[0][0, 0] = float("nan")
    save_adapter(broken, tmp_path / "nan", base="org/tiny")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        engine.add_adapter("nan", tmp_path / "nan")
    with pytest.raises(RequestError, match="differ in number"):
        engine.generate([[5], [6]], PARAMS, adapter=["all"])
    assert engine.stats().adapters == ("all", "some", "stable")


def test_async_callers_choose_adapters_that_come_and_go(
    decoder: Decoder, saved: dict[str, Path], make_prompts: MakePrompts
) -> None:
    prompts = make_prompts(3, seed=10)
    names: list[str | None] = ["all", None, "some"]
    expected = expected_of(decoder, saved, names, prompts)

    async def all_of_them() -> None:
        async with AsyncEngine(NativeEngine(decoder, adapters={"all": saved["all"]})) as served:
            first = served.generate(prompts[0], PARAMS, adapter="all")
            await served.add_adapter("some", saved["some"])
            outputs = await asyncio.gather(
                first, served.generate(prompts[1], PARAMS), served.generate(prompts[2], PARAMS, adapter="some")
            )
            assert tokens_of(outputs) == expected
            events = [event async for event in served.stream(prompts[2], PARAMS, adapter="some")]
            assert sum((event.token_ids for event in events), ()) == expected[2]
            await served.remove_adapter("some")
            with pytest.raises(ConfigError, match="there is no adapter some"):
                await served.remove_adapter("some")
            with pytest.raises(RequestError, match="there is no adapter"):
                await served.generate(prompts[2], PARAMS, adapter="some")

    asyncio.run(all_of_them())
