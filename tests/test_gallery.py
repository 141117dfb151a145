"""What a gallery shows is what a search by hand finds."""

import torch
import torch.nn.functional as F

from mlip_cli.evaluate.gallery import random_queries
from mlip_cli.evaluate.picture_results import Shown


def number(number: int) -> Shown:
    return Shown(text=str(number))


def test_answers_are_those_of_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    right = [[i, i + 10] for i in range(20)]
    found = random_queries(queries, gallery, right, asked=number, answer=number, n=6, k=4)
    assert len({query.asked.text for query in found}) == 6
    for query in found:
        asked = int(query.asked.text)
        order = (gallery @ queries[asked]).argsort(descending=True).tolist()
        assert [int(answer.text) for answer in query.found] == order[:4]
        assert [answer.is_right for answer in query.found] == [candidate in right[asked] for candidate in order[:4]]
        assert int(query.first_right.text) == next(candidate for candidate in order if candidate in right[asked])
        assert query.rank == order.index(int(query.first_right.text))


def test_queries_are_drawn_the_same_each_time_and_never_more_than_there_are() -> None:
    features = F.normalize(torch.eye(3), dim=1)
    own = [[0], [1], [2]]
    first, second = (random_queries(features, features, own, asked=number, answer=number, n=8, k=5) for _ in range(2))
    assert first == second
    assert sorted(query.asked.text for query in first) == ["0", "1", "2"]
    assert all(len(query.found) == 3 for query in first)
