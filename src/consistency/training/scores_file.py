"""`quality.jsonl`: the scores that a run has measured so far, one row a measurement and sampler."""

from __future__ import annotations

import json
from pathlib import Path

SCORES_FILE = "quality.jsonl"


def read_scores(run_dir: Path, name: str, every_n_images: int) -> dict[int, float]:
    """One score of a run, over time; empty for a run that has measured nothing.

    Args:
        run_dir: Of the run.
        name: Of the score and the sampler, as `fd_classifier_onestep`.
        every_n_images: Images between two measurements. Runs of different batches then meet at the same counts.

    Returns:
        Images after which a measurement was due -> value.

    Raises:
        OSError: if the file cannot be read.
    """
    file = run_dir / SCORES_FILE
    scores = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
            score = name.removesuffix(f"_{row['name']}")
            due = row["images_seen"] // every_n_images * every_n_images
            if score != name and score in row:
                scores[due] = float(row[score])
        except (ValueError, LookupError, TypeError):
            continue  # a line that the run is just writing
    return scores
