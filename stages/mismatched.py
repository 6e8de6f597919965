"""Prompts with the answers of other rows: what an objective looks at to see how far a model has moved from where it
started, on answers that nobody judged for that prompt (KTO, arXiv:2402.01306, section 4.1).

A row takes the answer of the next row in its shard whose prompt is another one, the first row after the last. Rows that
judge several answers to one prompt often stand next to each other, and those answers are no mismatch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.tokenized import may_train, read_spans, trained_ranges

Ids = NDArray[Any]


def answers(table: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[rows] Where each row's answer begins and ends, in tokens: from the first token that may train to the last. A row
    without one has both at its end."""
    spans = read_spans(table)
    length = table["ids"].combine_chunks().value_lengths().to_numpy().astype(np.int64)
    _, ranges, begins, ends = trained_ranges(spans, may_train(spans, "all"), length)
    first, some = np.cumsum(ranges) - ranges, ranges > 0
    begin, end = length.copy(), length.copy()
    begin[some], end[some] = begins[first[some]], ends[(first + ranges)[some] - 1]
    return begin, end


def mismatched(table: Any, most: int | None = None) -> Iterator[tuple[Ids, int]]:
    """Of each row of a table of tokens: its prompt with another row's answer, and where that begins. What is longer
    than `most` tokens, the model's context, is cut."""
    begin, end = answers(table)
    ids = [table["ids"][row].values.to_numpy() for row in range(len(begin))]
    prompts = [each[:cut] for each, cut in zip(ids, begin, strict=True)]
    for row, other in enumerate(_others([prompt.tobytes() for prompt in prompts], begin < end)):
        prompt = prompts[row] if most is None else prompts[row][: most - 1]
        yield np.concatenate([prompt, ids[other][begin[other] : end[other]]])[:most].astype(np.uint32), len(prompt)


def _others(prompts: Sequence[bytes], answered: NDArray[np.bool_]) -> list[int]:
    """[rows] For each the next row that has an answer to another prompt, else the next that has one, else itself."""
    found = list(range(len(prompts)))
    after: int | None = None
    for row in [*reversed(found)] * 2:  # the second time round, the first rows follow the last
        if after is not None:
            further = found[after]
            found[row] = further if prompts[after] == prompts[row] != prompts[further] else after
        after = row if answered[row] else after
    return found
