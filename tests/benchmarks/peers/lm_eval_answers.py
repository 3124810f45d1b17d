"""lm-eval's Hugging Face backend on the answers of conversations: their log-likelihood, given what stands before them.

python -m tests.benchmarks.peers.lm_eval_answers MODEL ROWS.jsonl BATCH DTYPE SCORES.json

The backend is given token ids, as its own tasks give them to it after it has tokenised their text. Prints one JSON line with
the seconds of loading and of scoring; the sums, in nats, go to a file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.benchmarks.encode import IGNORED, encode_chat


def main() -> None:
    from lm_eval.models.huggingface import HFLM

    folder, rows, batch, dtype, target = (
        sys.argv[1],
        Path(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
        Path(sys.argv[5]),
    )
    started = time.perf_counter()
    model = HFLM(pretrained=folder, dtype=dtype, device="cpu", batch_size=batch)
    loaded = time.perf_counter()
    requests = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        encoded = encode_chat(model.tokenizer, json.loads(line)["messages"])
        ids, labels = encoded["input_ids"], encoded["labels"]
        answer = [number for number, label in enumerate(labels) if label != IGNORED]
        requests.append((("", ""), ids[: answer[0]], ids[answer[0] : answer[-1] + 1]))
    encoded_at = time.perf_counter()
    scores = [score for score, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
    ended = time.perf_counter()
    target.write_text(json.dumps(scores), encoding="utf-8")
    found = {
        "load_seconds": loaded - started,
        "encode_seconds": encoded_at - loaded,
        "score_seconds": ended - encoded_at,
    }
    print(json.dumps(found | {"tokens": sum(len(c) + len(a) for _, c, a in requests)}))


if __name__ == "__main__":
    main()
