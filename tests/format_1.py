"""Tables of format 1, as the last version of softlabel that wrote them made them; ``make.py`` in the archive did.

``text`` has two temperatures, heads, sampled tails, two captures and a tag; ``chats`` has plain top-k heads;
``classes`` was made by a classifier. Their teachers are in ``teacher`` and ``classifier``.
"""

import zipfile
from math import exp, expm1, inf, log
from pathlib import Path
from typing import Any


def unpack(folder: Path) -> Path:
    """Unpack the tables and their teachers into a folder."""
    with zipfile.ZipFile(Path(__file__).with_suffix(".zip")) as archive:
        archive.extractall(folder)
    return folder


def decode(row: dict[str, Any], vocabulary: list[int], temperatures: int) -> list[tuple[Any, ...]]:
    """The reference reader of the first edition of FORMAT.md."""
    positions, h, t = [], 0, 0
    for i in range(row["positions"]):
        log_masses = row["tail_log_masses"][i * temperatures : (i + 1) * temperatures]
        head, code, n = [], 0, row["head_counts"][i]
        for rank, gap in zip(row["head_ids"][h : h + n], row["head_codes"][h : h + n], strict=True):
            code += gap
            head.append((vocabulary[rank], _logprob(code)))
        h += n
        if head:
            shift = log(-expm1(log_masses[0])) - log(sum(exp(value) for _, value in head))
            head = [(token, value + shift) for token, value in head]
        tail, n = [], row["tail_counts"][i]
        for j in range(t, t + n):
            code += row["tail_codes"][j]
            tail.append((vocabulary[row["tail_ids"][j]], row["tail_draws"][j], _logprob(code)))
        t += n
        entropy, following = row["entropies"][i] / 256, row["next_logprobs"][i]
        positions.append((head, tail, log_masses, entropy, following))
    return positions


def _logprob(code: int) -> float:
    return -inf if code >= 32767 else -code / 64
