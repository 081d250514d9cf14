"""Hold the quick start's report against what it promises; exit 1 and say what falls short.

python .ci/check_quickstart.py runs/quickstart
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run: Path) -> int:
    report = json.loads((run / "report.json").read_text())
    dense, pruned, sparse = report["dense"], report["pruned"], report["sparse"]
    promises = {
        "dense test accuracy at least 0.97": dense["accuracy"] >= 0.97,
        "pruned test accuracy at most 0.01 lower": pruned["accuracy"] >= dense["accuracy"] - 0.01,
        "at least 2 times fewer MACs": report["macs_ratio"] >= 2,
        "measured speed-up at least 2.5, of 3 asked for": report["speedup"]["value"] >= 2.5,
        "largest logit change at the cut at most 1e-4": sparse["max_abs_logit_change"] <= 1e-4,
        "parity at most 1e-4 of the largest logit": report["parity"]["max_rel"] <= 1e-4,
        "finished within five minutes": sum(stage["seconds"] for stage in report["stages"]) <= 300,
    }
    for promise, kept in promises.items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
