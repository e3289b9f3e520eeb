"""Loading with quantization never holds much more than what it ends with, measured on processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.models.synth import write_random_checkpoint

LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from burnish.compress.optimise import load_optimised

def read():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line[:5]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}

before = read()["VmRSS"]
loaded = load_optimised(Path(sys.argv[1]), quantize=sys.argv[2], dtype=torch.bfloat16)
after = read()
print(json.dumps({"peak": after["VmHWM"] - before, "end": after["VmRSS"] - before,
                  "weights": loaded.report.bytes_after, "cached": loaded.report.cached}))
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(LARGE, tmp_path_factory.mktemp("large"), seed=0, dtype="bfloat16")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_peak_stays_near_the_end_when_made_and_when_read(large_folder: Path, quantize: str) -> None:
    for cached in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(large_folder), quantize],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert figures["cached"] is cached
        assert figures["end"] >= figures["weights"]
        # The interpreter and torch are not counted in: with them the share is smaller still.
        assert figures["peak"] <= 1.3 * figures["end"], figures
        assert figures["peak"] <= 1.3 * figures["weights"] + 64 * 2**20, figures
