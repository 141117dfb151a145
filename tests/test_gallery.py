"""What a gallery shows is what a search by hand finds."""

import torch
import torch.nn.functional as F

from mlip_cli.evaluate.gallery import random_queries


def test_answers_are_those_of_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    right = [[i, i + 10] for i in range(20)]
    found = random_queries(queries, gallery, right, n=6, k=4)
    assert len({query.number for query in found}) == 6
    for query in found:
        order = (gallery @ queries[query.number]).argsort(descending=True).tolist()
        assert list(query.found) == order[:4]
        assert list(query.is_right) == [candidate in right[query.number] for candidate in order[:4]]
        assert query.first_right == next(candidate for candidate in order if candidate in right[query.number])
        assert query.rank == order.index(query.first_right)


def test_queries_are_drawn_the_same_each_time_and_never_more_than_there_are() -> None:
    features = F.normalize(torch.eye(3), dim=1)
    own = [[0], [1], [2]]
    first = random_queries(features, features, own, n=8, k=5)
    assert first == random_queries(features, features, own, n=8, k=5)
    assert sorted(query.number for query in first) == [0, 1, 2]
    assert all(len(query.found) == 3 for query in first)
