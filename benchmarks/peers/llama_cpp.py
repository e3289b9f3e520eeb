"""llama.cpp: its own tool llama-batched-bench, all passes in one process; it draws its own random prompts.

The tool feeds back random ids instead of sampling, and decodes one step more than an answer needs (the prompt's own
step yields the first token). That step is taken off: wall = prompt time + (n - 1) / n of the decoding time. The prompt
time stands for the time to the first token.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
from pathlib import Path

from work import Pass, arguments, chosen_work, report

parser = arguments(__doc__)
parser.add_argument("--tools", type=Path, required=True, help="folder of the built tools")
parser.add_argument("--flash-attention", choices=("on", "off", "auto"), default="on")
parser.add_argument("--batch", type=int, default=2048, help="-b: most tokens handed over at once")
parser.add_argument("--micro-batch", type=int, default=512, help="-ub: most tokens computed at once")
flags = parser.parse_args()
work = chosen_work(flags)

context = work.requests * (work.input_tokens + work.output_tokens)
options = {
    "-m": flags.model,
    "-c": context,
    "-b": flags.batch,
    "-ub": flags.micro_batch,
    "-npp": work.input_tokens,
    "-ntg": work.output_tokens,
    "-npl": ",".join([str(work.requests)] * (flags.runs + 1)),  # the first pass warms up
    "-t": flags.threads,
    "-tb": flags.threads,
    "-fa": flags.flash_attention,
    "-lv": 4,  # says which buffers hold the weights
    "--output-format": "jsonl",
}
tool = str(flags.tools / "llama-batched-bench")
command = [tool, *(str(part) for pair in options.items() for part in pair)]
done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
if done.returncode or len(rows) != flags.runs + 1:
    raise SystemExit(f"llama-batched-bench ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")

passes = [
    Pass(
        wall_s=row["t_pp"] + row["t_tg"] * (row["tg"] - 1) / row["tg"],
        ttft_s=row["t_pp"] if work.requests == 1 else None,
    )
    for row in rows
]
stated = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
version = re.search(r"^version: (\S+)", stated.stdout + stated.stderr, re.MULTILINE)
settings = {
    "flash_attention": flags.flash_attention,
    "batch": flags.batch,
    "micro_batch": flags.micro_batch,
    "amx_buffer": "AMX model buffer" in done.stderr + done.stdout,
    "tool_rows": [{name: row[name] for name in ("t_pp", "t_tg", "t")} for row in rows],
}
report(
    flags,
    work,
    passes,
    system="llama.cpp",
    version=version.group(1) if version else "unknown",
    settings=settings,
    peak_rss_mib=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
)
