"""Do the shipped weights reach the bits per byte that their training record and the README state?

The claim is checked on the held-out modules of the Python that runs this; the record was made with the version it
names, and another version's modules differ a little. A 5-gram Kneser-Ney model trained on the same text stands beside.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

from loglik.models.load import load
from loglik.models.ngram import NGramLM
from loglik.models.protocol import TextModel
from loglik.models.stdlib_text import stdlib_documents
from loglik.scoring.score import score

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "recipes" / "tiny" / "record.json"


def bits_per_byte(model: TextModel) -> float:
    texts = [d.text for d in stdlib_documents("held_out")]
    return score(model, texts, unit="byte", overflow="window").total().bits_per_byte().item()


def main() -> str:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    claimed = record["held_out_bits_per_byte"]
    tiny = bits_per_byte(load("tiny", device="cpu"))
    train = [d.text for d in stdlib_documents("train")]
    ngram = bits_per_byte(NGramLM.train(train, order=5))
    same_python = record["python"] == platform.python_version()
    tolerance = 1e-3 if same_python else 0.05
    verdict = "reproduced" if abs(tiny - claimed) <= tolerance and tiny < ngram else "not reproduced"
    print(f"claim: tiny codes the held-out modules at {claimed:.4f} bits per byte (Python {record['python']})")
    here = platform.python_version()
    print(f"measured: tiny {tiny:.4f}, byte 5-gram {ngram:.4f} (Python {here}), tolerance {tolerance}")
    results = {
        "claimed": round(claimed, 4),
        "tiny": round(tiny, 4),
        "byte_5gram": round(ngram, 4),
        "tolerance": tolerance,
        "python": platform.python_version(),
        "verdict": verdict,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return verdict


if __name__ == "__main__":
    print(main())
