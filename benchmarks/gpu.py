"""Mistral-7B's shape on this machine's GPU: burnish in 16, 8 and 4 bits, transformers static and continuous, the limit.

    python benchmarks/gpu.py

Random weights, 32 requests of 128 tokens in and 128 out, greedy. Every round runs each system once, one after the
other, after one pass that warms up; a system has the card for itself and a process of its own. The limit is what
reading the weights once per decoding step allows at the bandwidth that a copy reaches on this card; the reading of the
prompts and of the cache come on top of it. Writes a JSON record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.measure.hardware import hardware_record, version_record
from burnish.models.synth import write_random_checkpoint

QUANTIZE = {"burnish 16 bits": "none", "burnish int8": "int8", "burnish int4": "int4"}
TRANSFORMERS = {"transformers static": False, "transformers continuous": True}
_PROBE_BYTES = 4 << 30


def main() -> int:
    """Returns the exit status: 0 also where there is no GPU."""
    flags = _arguments()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; there is none here.")
        return 0
    names = [name for name in (*QUANTIZE, *TRANSFORMERS) if flags.only is None or name in flags.only]
    bandwidth = _bandwidth()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
        folder = flags.model or write_random_checkpoint(flags.shape, Path(scratch) / flags.shape, dtype="bfloat16")
        runs = [_apart(name, folder, flags) for _ in range(flags.rounds) for name in names]
    results = [_summed_up([run for run in runs if run["name"] == name], bandwidth, flags) for name in names]
    _print(results, bandwidth, flags)
    record = {
        "date": str(date.today()),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "hardware": hardware_record(),
        "versions": version_record(),
        "work": {
            name: getattr(flags, name) for name in ("shape", "requests", "tokens_in", "tokens_out", "rounds", "memory")
        },
        "runs": runs,
        "results": results,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"written to {flags.out}")
    return 1 if any("error" in run for run in runs) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mistral-7b", help="a name of burnish.models.shapes")
    parser.add_argument("--model", type=Path, help="a model folder instead of random weights in a shape")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", help="make the card behave as one of this size for burnish, as 16GiB")
    parser.add_argument("--only", action="append", choices=[*QUANTIZE, *TRANSFORMERS], help="may be repeated")
    parser.add_argument("--scratch", type=Path, help="where the weights are written (14.5 GB for mistral-7b)")
    out = Path(__file__).parent / "results" / f"{date.today()}-gpu.json"
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def _apart(name: str, folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """One turn of one system in a new process, whose end frees the card."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_turn, args=(name, folder, flags, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = {"error": "the process ended without a result"}
    process.join()
    shown = found.get("error") or f"{found['seconds']:.2f} s, {found['tokens_per_s']:,.0f} tokens/s out"
    print(f"{name}: {shown}", flush=True)
    return {"name": name, **found}


def _turn(name: str, folder: Path, flags: argparse.Namespace, sender: Any) -> None:
    try:
        run = _burnish if name in QUANTIZE else _transformers
        sender.send(run(name, folder, flags))
    except Exception as error:
        sender.send({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def _burnish(name: str, folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    engine = NativeEngine(
        folder,
        device="cuda",
        quantize=QUANTIZE[name],
        weights_cache=False,
        max_num_seqs=flags.requests,
        max_model_len=flags.tokens_in + flags.tokens_out,
        memory=flags.memory,
        prefix_caching=False,
        speculation="off",
        max_batch_tokens=2048,
    )
    params = SamplingParams(max_tokens=flags.tokens_out, ignore_eos=True)
    vocabulary = engine.decoder.config.vocab_size

    def work() -> list[float]:
        outputs = list(engine.generate(_prompts(flags, vocabulary), params))
        assert all(len(output.token_ids) == flags.tokens_out for output in outputs)
        return [output.metrics.tpot_ms for output in outputs if output.metrics.tpot_ms is not None]

    engine.warm_up()
    work()
    seconds, per_token_ms = _timed(work)
    stats = engine.stats()
    return _figures(flags, seconds) | {
        "tpot_p50_ms": statistics.median(per_token_ms),
        "backend": stats.backend,
        "dtype": stats.dtype,
        "weights_bytes": stats.weights_bytes,
        "kv_bytes": stats.kv_bytes,
        "load_s": stats.load_s,
        "warmup_s": stats.warmup_s,
    }


def _transformers(name: str, folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cuda").eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=flags.tokens_out, min_new_tokens=flags.tokens_out, do_sample=False, pad_token_id=0
    )
    prompts = _prompts(flags, model.config.vocab_size)

    def static() -> None:
        tokens_BT = torch.tensor(prompts, device="cuda")
        with torch.inference_mode():
            out_BT = model.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), generation_config=settings)
        assert out_BT.shape[1] == flags.tokens_in + flags.tokens_out

    def continuous() -> None:
        # An end token may end an answer early here: the tokens that came are what counts.
        outputs = model.generate_batch(inputs=prompts, generation_config=settings)
        produced = sum(len(output.generated_tokens) for output in outputs.values())
        assert produced >= 0.99 * flags.requests * flags.tokens_out, f"only {produced} tokens came"

    work = continuous if TRANSFORMERS[name] else static
    work()
    seconds, _ = _timed(work)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return _figures(flags, seconds) | {"dtype": str(model.dtype).removeprefix("torch."), "weights_bytes": weights}


def _prompts(flags: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (flags.requests, flags.tokens_in), generator=generator).tolist()


def _timed(work: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _figures(flags: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens_per_s": flags.requests * flags.tokens_out / seconds,
        "peak_bytes": torch.cuda.max_memory_reserved(),
    }


def _bandwidth() -> float:
    """Bytes per second that a copy reads and writes on this card, the best of some."""
    size = min(_PROBE_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    best = min(_timed(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * size / best


def _summed_up(runs: list[dict[str, Any]], bandwidth: float, flags: argparse.Namespace) -> dict[str, Any]:
    good = [run for run in runs if "error" not in run]
    if not good:
        return {"name": runs[0]["name"], "error": runs[0]["error"]}
    speeds = [run["tokens_per_s"] for run in good]
    limit = flags.requests * bandwidth / good[0]["weights_bytes"]
    return {
        "name": good[0]["name"],
        "tokens_per_s": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "limit_tokens_per_s": limit,
        "share_of_limit": statistics.median(speeds) / limit,
        "weights_bytes": good[0]["weights_bytes"],
        "peak_bytes": max(run["peak_bytes"] for run in good),
    }


def _print(results: list[dict[str, Any]], bandwidth: float, flags: argparse.Namespace) -> None:
    print(
        f"\n{flags.shape}, {flags.requests} x ({flags.tokens_in} in + {flags.tokens_out} out), "
        f"{torch.cuda.get_device_name()}, {bandwidth / 1e9:,.0f} GB/s copied"
    )
    print(f"{'system':<26}{'tokens/s out':>14}{'spread':>18}{'of the limit':>14}{'weights GiB':>13}{'peak GiB':>10}")
    for result in results:
        if "error" in result:
            print(f"{result['name']:<26}{result['error']}")
            continue
        spread = f"{result['lowest']:,.0f} to {result['highest']:,.0f}"
        print(
            f"{result['name']:<26}{result['tokens_per_s']:>14,.0f}{spread:>18}{result['share_of_limit']:>14.0%}"
            f"{result['weights_bytes'] / 2**30:>13.1f}{result['peak_bytes'] / 2**30:>10.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
