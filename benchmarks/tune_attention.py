"""Time the tiles of our attention kernels and write the best of each to loras_bench/attention/tiles.json.

    python benchmarks/tune_attention.py [--head-dims 64,128] [--out FILE]

Every (head dim, kind of pattern, kernel) is timed by itself, bfloat16, random inputs, L2 flushed between runs, medians.
All candidates are compiled first, by as many processes as there are cores; the timing runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from loras_bench.attention.binding import AttentionBatch
from loras_bench.attention.operators import Launch, packed, sparse_attention, sparse_attention_backward
from loras_bench.attention.patterns import BigBird, Dense, PatternBase, Window
from loras_bench.attention.tiles import Kernel, TileChoice

TOKENS, LENGTH = 32768, 8192
REGIMES: dict[str, PatternBase] = {
    "short": Window(window=512, global_tokens=64),
    "long": Dense(),
    "listed": BigBird(block=64, window_blocks=5, global_blocks=1, random_blocks=3),
}
SHARED_MEMORY = 227 * 1024
HEADS = {32: (16, 16), 64: (9, 3), 96: (8, 8), 128: (8, 4)}


def candidates(kernel: Kernel, head_dim: int, regime: str) -> list[TileChoice]:
    """Tiles worth a try: what fits in shared memory and has enough work for its warps."""
    if regime == "listed":
        sizes = [(64, 64)]
    else:
        sizes = (
            [(64, 32), (64, 64), (64, 128), (128, 64), (128, 128)]
            if head_dim <= 64
            else [(64, 32), (64, 64), (128, 32), (128, 64), (64, 128)]
        )
        if kernel == "keys":
            sizes += [(32, 64), (32, 128)]
    found = []
    for (queries, keys), warps, stages in product(sizes, (4, 8), (1, 2, 3, 4)):
        visited = queries if kernel == "keys" else keys
        if stages * visited * head_dim * 4 + (queries + keys) * head_dim * 4 > SHARED_MEMORY:
            continue
        if warps == 8 and queries * keys < 64 * 64 * (1 if head_dim == 128 else 2):
            continue
        if stages == 1 and kernel == "forward":
            continue
        found.append(TileChoice(queries, keys, warps, stages))
    return found


def setting(head_dim: int, regime: str) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    heads, key_heads = HEADS[head_dim]
    batch = TOKENS // LENGTH

    def normal(n: int) -> torch.Tensor:
        return torch.randn(batch, LENGTH, n, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    inputs = {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads), "do": normal(heads)}
    facts = AttentionBatch(length=LENGTH, causal=True, device=torch.device("cuda"))
    return inputs, facts.bound(REGIMES[regime])


def caller(kernel: Kernel, choice: TileChoice, inputs: dict[str, torch.Tensor], bound: Any, out: Any, lse: Any) -> Any:
    """A function that launches one kernel."""
    q, k, v, do = inputs["q"], inputs["k"], inputs["v"], inputs["do"]
    scale = q.shape[3] ** -0.5
    tables, numbers = packed([Launch.of(part, kernel, choice, q.shape[1] // k.shape[1]) for part in bound.parts])
    if kernel == "forward":
        return lambda: sparse_attention(q, k, v, tables, numbers, scale)
    if kernel == "queries":
        return lambda: sparse_attention_backward(q, k, v, out, lse, do, None, tables, numbers, [], [], scale)
    return lambda: sparse_attention_backward(q, k, v, out, lse, do, None, [], [], tables, numbers, scale)


def first_results(inputs: dict[str, torch.Tensor], bound: Any) -> tuple[torch.Tensor, torch.Tensor]:
    safe = TileChoice(64, 64, 4, 2)
    out: tuple[torch.Tensor, torch.Tensor] = caller("forward", safe, inputs, bound, None, None)()
    return out


def compile_some(jobs: list[tuple[int, str, Kernel, TileChoice]]) -> list[str]:
    """Launch each once, which fills Triton's cache on disk."""
    failed = []
    for head_dim, regime, kernel, choice in jobs:
        try:
            inputs, bound = setting(head_dim, regime)
            caller(kernel, choice, inputs, bound, *first_results(inputs, bound))()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{head_dim} {regime} {kernel} {tuple(choice)}: {str(error)[:80]}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", default="32,64,96,128")
    parser.add_argument("--regimes", default="short,long,listed")
    parser.add_argument("--out", type=Path, default=Path("loras_bench/attention/tiles.json"))
    options = parser.parse_args()
    jobs: list[tuple[int, str, Kernel, TileChoice]] = [
        (head_dim, regime, kernel, choice)
        for head_dim in map(int, options.head_dims.split(","))
        for regime in options.regimes.split(",")
        for kernel in ("forward", "queries", "keys")
        for choice in candidates(kernel, head_dim, regime)  # type: ignore[arg-type]
    ]
    workers = min(os.cpu_count() or 1, 14)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for failed in pool.map(compile_some, [jobs[index::workers] for index in range(workers)]):
            for line in failed:
                print("cannot run:", line, file=sys.stderr)
    write_best(jobs, options.out)


def write_best(jobs: list[tuple[int, str, Kernel, TileChoice]], out: Path) -> None:
    """Time all candidates; the fastest of each group goes into the table."""
    from triton.testing import do_bench

    table: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    table["tuned on"] = torch.cuda.get_device_name()
    state: tuple[Any, ...] = ()
    for group in dict.fromkeys(job[:3] for job in jobs):
        head_dim, regime, kernel = group
        if state[:2] != (head_dim, regime):
            inputs, bound = setting(head_dim, regime)
            state = (head_dim, regime, inputs, bound, first_results(inputs, bound))
        times = []
        for choice in (job[3] for job in jobs if job[:3] == group):
            try:
                call = caller(kernel, choice, state[2], state[3], *state[4])
                times.append((do_bench(call, warmup=5, rep=20, return_mode="median"), choice))
            except Exception:
                continue  # named when it was compiled
        times.sort()
        best = ", ".join(f"{tuple(choice)} {ms:.3f} ms" for ms, choice in times[:4])
        print(f"{head_dim} {regime} {kernel}: {best} ... worst {times[-1][0]:.3f} ms", flush=True)
        table.setdefault(str(head_dim), {}).setdefault(regime, {})[kernel] = list(times[0][1])
    lines = [f' "{key}": {json.dumps(value)}' for key, value in table.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
