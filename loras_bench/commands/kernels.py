"""`loras-bench kernels`: our attention kernels beside those that a user has without them, on the same inputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loras_bench.benchmarking.cases import Case, read_cases
from loras_bench.errors import UserError
from loras_bench.files import check_file

if TYPE_CHECKING:
    from loras_bench.benchmarking.measuring import Result

SHAPES = ("2x16x8192x64", "2x16x8192x128")
PATTERNS = ("window:512+64", "window:256,bidirectional")


def compare_kernels(shapes: Sequence[str], patterns: Sequence[str], seconds: float, json_file: Path | None) -> int:
    """Measure every pattern at every shape and print a table of each; returns the exit status.

    Raises:
        UserError: There is no CUDA device, the file cannot be written, or a shape or pattern cannot be read.
    """
    cases = read_cases(shapes, patterns)
    if json_file is not None:
        check_file(json_file)
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is available to torch: there are no kernels to compare", "see `loras-bench doctor`"
        )
    results = _measure(cases, seconds, json_file)
    return 0 if any(row.both for result in results for row in result.rows) else 1


def _measure(cases: Sequence[Case], seconds: float, json_file: Path | None) -> list[Result]:
    from loras_bench.benchmarking.bench import CudaBench
    from loras_bench.benchmarking.contenders import contenders
    from loras_bench.benchmarking.measuring import CaseRunner
    from loras_bench.benchmarking.report import PROTOCOL, print_result, to_json, write_json
    from loras_bench.metering.environment import collect_environment

    environment = collect_environment()
    results = []
    with CudaBench(seconds) as bench:
        runner = CaseRunner(contenders(), bench, lambda line: print(line, file=sys.stderr))
        for case in cases:
            results.append(runner.run(case))
            print_result(results[-1])
            if json_file is not None:  # after each case: what is finished survives a kill
                write_json(json_file, to_json(results, environment))
    print(PROTOCOL)
    return results
